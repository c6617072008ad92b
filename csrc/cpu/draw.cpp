// The passes over a row of logits that sampling makes, several tokens at a time; what they leave is settled one by one.
#include "cpu/kernels.h"
#include "cpu/splitmix.h"
#include "cpu/table.h"
#include "cpu/vector.h"

namespace atts {
namespace ATTS_ISA {

namespace {

typedef uint64_t W8 __attribute__((vector_size(64)));

}  // namespace

void extremes(const uint16_t* x, int64_t n, int16_t* highest, uint16_t* size) {
  int16_t most = INT16_MIN, large = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<int16_t>(x[i]), magnitude = static_cast<int16_t>(bits & 0x7fff);
    const auto key = static_cast<int16_t>(bits ^ ((bits >> 15) & 0x7fff));  // ordered as the values are, -0 below 0
    most = key > most ? key : most;
    large = magnitude > large ? magnitude : large;
  }
  *highest = most;
  *size = static_cast<uint16_t>(large);
}

int64_t find(const uint16_t* x, int64_t n, uint16_t a, uint16_t b) {
  constexpr int64_t kStep = 64;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    uint16_t hit = 0;
    for (int64_t j = 0; j < kStep; ++j) hit |= static_cast<uint16_t>((x[i + j] == a) | (x[i + j] == b));
    if (hit) break;
  }
  while (i < n && x[i] != a && x[i] != b) ++i;
  return i;
}

int64_t contenders(const uint16_t* logits, int64_t first, int64_t n, float slope, float shift, uint64_t stream,
                   uint32_t* which) {
  for (int64_t id = first; id + 8 <= n; id += 8) {
    // As `draw` has it, with the hash cut to its upper half and the bound widened by more than that and rounding take.
    F8 y = from_bf16(load<H8>(logits + id)) * slope + shift;
    const I8 live = y > 125.0f;
    W8 bits{0, 1, 2, 3, 4, 5, 6, 7};
    bits = mix(stream + (bits + static_cast<uint64_t>(id + 1)) * kGolden);
    const F8 upper = __builtin_convertvector((I8)__builtin_convertvector(bits >> 32, U8) & 0x7fffffff, F8);
    y = select(y > 190.0f, all(190.0f), select(live, y, all(125.0f)));
    const F8 bound = (F8)__builtin_convertvector((y - 32.0f) * 8388608.0f, I8);
    const I8 may = live & (upper <= bound * (1.0f + 0x1p-16f) + 2.0f);
    uint32_t found = 0;
    for (int lane = 0; lane < 8; ++lane) found |= static_cast<uint32_t>(may[lane] & 1) << lane;
    if (found) {
      *which = found;
      return id;
    }
  }
  return n;
}

}  // namespace ATTS_ISA
}  // namespace atts
