// The host's bfloat16 ops behind the C ABI: arguments checked, work cut for the threads.
#include <vector>

#include "atts/atts.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/logprob.h"
#include "cpu/parallel.h"

namespace atts {

namespace {

constexpr int64_t kColumns = 128;        // weight rows handed to a thread at a time, at most
constexpr int64_t kShares = 4;           // of them for each thread, at least
constexpr int64_t kRows = 256;           // input rows whose results lie in a thread's scratch
constexpr int64_t kScoreRows = 64;       // the same for a block of logits
constexpr int64_t kSerialValues = 32768;  // below, waking a thread costs more than the work

const float* prepared(const uint16_t* x, int64_t rows, int64_t n) {
  thread_local std::vector<float> held;
  held.resize(static_cast<size_t>(rows * n));
  kernels().prepare(x, rows, n, held.data());
  return held.data();
}

// Weight rows of a thread's share: large, for what one block leaves the next to read on; many, so that no thread waits long.
int64_t columns_of(int64_t all, int64_t threads) {
  const int64_t even = (all / (kShares * threads) + 31) / 32 * 32;
  return even < 32 ? 32 : even < kColumns ? even : kColumns;
}

// Rows first .. last-1 to each thread, in one piece where the work is small.
template <class Params, class Kernel>
void by_rows(const Params& p, int64_t rows, int64_t width, Kernel kernel) {
  const int64_t part = rows * width < kSerialValues ? rows : (rows + p.threads - 1) / p.threads;
  parallel((rows + part - 1) / part, p.threads,
           [&](int64_t i) { kernel(p, i * part, (i + 1) * part < rows ? (i + 1) * part : rows); });
}

}  // namespace
}  // namespace atts

using atts::kernels;
using atts::parallel;

extern "C" int atts_linear_cpu(const atts_linear_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_linear_params& p = *params;
  if (p.rows < 0 || p.in_features < 1 || p.out_features < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (p.rows == 0) return ATTS_OK;
  if (p.x == nullptr || p.weight == nullptr || p.out == nullptr) return ATTS_ERROR_NULL_POINTER;
  const float* x = atts::prepared(p.x, p.rows, p.in_features);
  const int64_t width = atts::columns_of(p.out_features, p.threads);
  parallel((p.out_features + width - 1) / width, p.threads, [&](int64_t block) {
    const int64_t first = block * width, left = p.out_features - first;
    const int64_t columns = left < width ? left : width;
    float* sums = atts::scratch(atts::kRows * atts::kColumns);
    for (int64_t at = 0; at < p.rows; at += atts::kRows) {
      const int64_t rows = p.rows - at < atts::kRows ? p.rows - at : atts::kRows;
      kernels().dot(x + at * p.in_features, rows, p.weight + first * p.in_features, columns, p.in_features, sums,
                    atts::kColumns);
      for (int64_t row = 0; row < rows; ++row)
        kernels().narrow(sums + row * atts::kColumns, p.bias == nullptr ? nullptr : p.bias + first, columns,
                         p.out + (at + row) * p.out_features + first);
    }
  });
  return ATTS_OK;
}

extern "C" int atts_score_tokens_cpu(const atts_score_tokens_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_score_tokens_params& p = *params;
  if (p.rows < 0 || p.width < 1 || p.vocab < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (p.rows == 0) return ATTS_OK;
  if (p.hidden == nullptr || p.weight == nullptr || p.ids == nullptr || p.logprob == nullptr)
    return ATTS_ERROR_NULL_POINTER;
  for (int64_t row = 0; row < p.rows; ++row)
    if (p.ids[row] < 0 || p.ids[row] >= p.vocab) return ATTS_ERROR_KEY;
  const float* hidden = atts::prepared(p.hidden, p.rows, p.width);
  const int64_t blocks = (p.vocab + atts::kScoreBlock - 1) / atts::kScoreBlock;
  std::vector<float> peaks(static_cast<size_t>(blocks * p.rows)), sums(peaks.size());
  std::vector<float> target(static_cast<size_t>(p.rows));
  parallel(blocks, p.threads, [&](int64_t block) {
    const int64_t first = block * atts::kScoreBlock, left = p.vocab - first;
    const int64_t columns = left < atts::kScoreBlock ? left : atts::kScoreBlock;
    float* logits = atts::scratch(atts::kScoreRows * atts::kScoreBlock);
    for (int64_t at = 0; at < p.rows; at += atts::kScoreRows) {
      const int64_t rows = p.rows - at < atts::kScoreRows ? p.rows - at : atts::kScoreRows;
      kernels().dot(hidden + at * p.width, rows, p.weight + first * p.width, columns, p.width, logits,
                    atts::kScoreBlock);
      for (int64_t row = 0; row < rows; ++row) {
        float* own = logits + row * atts::kScoreBlock;
        const int64_t id = p.ids[at + row] - first;
        if (id >= 0 && id < columns) target[static_cast<size_t>(at + row)] = own[id];
        const size_t place = static_cast<size_t>(block * p.rows + at + row);
        kernels().softmax_parts(own, columns, &peaks[place], &sums[place]);
      }
    }
  });
  for (int64_t row = 0; row < p.rows; ++row)
    p.logprob[row] = atts::logprob_of(target[static_cast<size_t>(row)], &peaks[static_cast<size_t>(row)],
                                      &sums[static_cast<size_t>(row)], blocks, p.rows);
  return ATTS_OK;
}

extern "C" int atts_attention_cpu(const atts_attention_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_attention_params& p = *params;
  if (p.rows < 0 || p.batch < 0 || p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads || p.head_dim < 16 ||
      p.head_dim % 16 || p.page < 1 || p.pages < 0 || p.table_width < 0 || p.threads < 1)
    return ATTS_ERROR_SHAPE;
  if (p.cu_q == nullptr || (p.batch > 0 && p.kv_len == nullptr)) return ATTS_ERROR_NULL_POINTER;
  if (p.cu_q[0] != 0 || p.cu_q[p.batch] != p.rows) return ATTS_ERROR_BATCH;
  if (p.rows == 0) return ATTS_OK;
  if (p.q == nullptr || p.kv == nullptr || p.block_table == nullptr || p.out == nullptr) return ATTS_ERROR_NULL_POINTER;
  struct Unit {
    int64_t sequence, first, last;
  };
  std::vector<Unit> units;
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows = p.cu_q[b + 1] - p.cu_q[b], length = p.kv_len[b];
    if (rows < 0 || rows > length || length > p.table_width * p.page) return ATTS_ERROR_BATCH;
    if (rows == 0) continue;
    for (int64_t i = 0; i * p.page < length; ++i) {
      const int32_t page = p.block_table[b * p.table_width + i];
      if (page < 0 || page >= p.pages) return ATTS_ERROR_BATCH;
    }
    longest = length > longest ? length : longest;
    for (int64_t first = 0; first < rows; first += atts::kAttentionRows)
      units.push_back({b, first, first + atts::kAttentionRows < rows ? first + atts::kAttentionRows : rows});
  }
  const int64_t floats = kernels().attention_scratch(p, longest);
  // A thread that has all heads of a unit finds the next head's keys in the lines beside the last one's.
  const auto all = static_cast<int64_t>(units.size()), apart = all < 4 * p.threads ? p.kv_heads : 1;
  parallel(all * apart, p.threads, [&](int64_t i) {
    const Unit& unit = units[static_cast<size_t>(i / apart)];
    const int64_t heads = p.kv_heads / apart;
    for (int64_t h = i % apart * heads; h < (i % apart + 1) * heads; ++h)
      kernels().attend(p, unit.sequence, h, unit.first, unit.last, atts::scratch(floats));
  });
  return ATTS_OK;
}

extern "C" int atts_rms_norm_cpu(const atts_rms_norm_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_rms_norm_params& p = *params;
  if (p.rows < 0 || p.width < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (p.rows == 0) return ATTS_OK;
  if (p.x == nullptr || p.weight == nullptr || p.out == nullptr || (p.delta == nullptr) != (p.sum == nullptr))
    return ATTS_ERROR_NULL_POINTER;
  atts::by_rows(p, p.rows, p.width, kernels().rms_norm);
  return ATTS_OK;
}

extern "C" int atts_silu_mul_cpu(const atts_silu_mul_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_silu_mul_params& p = *params;
  if (p.rows < 0 || p.width < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (p.rows == 0) return ATTS_OK;
  if (p.gate == nullptr || p.up == nullptr || p.out == nullptr) return ATTS_ERROR_NULL_POINTER;
  atts::by_rows(p, p.rows, p.width, kernels().silu_mul);
  return ATTS_OK;
}

extern "C" int atts_rope_cpu(const atts_rope_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_rope_params& p = *params;
  if (p.rows < 0 || p.heads < 1 || p.head_dim < 2 || p.head_dim % 2 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (p.rows == 0) return ATTS_OK;
  if (p.x == nullptr || p.cosine == nullptr || p.sine == nullptr || p.out == nullptr) return ATTS_ERROR_NULL_POINTER;
  atts::by_rows(p, p.rows, p.heads * p.head_dim, kernels().rope);
  return ATTS_OK;
}
