// Which instruction set's kernels run: the best that the processor has, or the one that was asked for.
#include <atomic>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/table.h"

namespace atts {
namespace {

// From the best to the plainest; the last one runs everywhere.
struct Candidate {
  const Kernels* table;
  bool runs;
};

#if defined(__x86_64__)
const Candidate kCandidates[] = {
#if defined(ATTS_WITH_AVX512BF16)
    {&avx512bf16::kTable,
     __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq")},
#endif
    {&avx2::kTable, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
    {&plain::kTable, true}};
#else
const Candidate kCandidates[] = {{&plain::kTable, true}};
#endif

const Kernels* find(const char* isa) {
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs && (isa == nullptr || std::strcmp(isa, candidate.table->isa) == 0)) return candidate.table;
  return nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{find(nullptr)};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

}  // namespace atts

extern "C" const char* atts_cpu_isa(void) { return atts::kernels().isa; }

extern "C" int atts_use_cpu_isa(const char* isa) {
  const atts::Kernels* table = atts::find(isa);
  if (table == nullptr) return ATTS_ERROR_ISA;
  atts::current().store(table);
  return ATTS_OK;
}
