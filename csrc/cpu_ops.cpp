// The host's ops behind the C ABI: arguments checked, then cpu/ops.cpp.
#include <vector>

#include "atts/atts.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/logprob.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace {

using atts::all_aligned;
using atts::elements_aligned;
using atts::kernels;
using atts::parallel;
using atts::product;

constexpr int64_t kScoreRows = 64;  // input rows whose block of logits lies in a thread's scratch

constexpr int64_t kWidest = sizeof(float);  // bytes of an element, widened

atts_status check_rows(int64_t rows, int64_t width, int64_t stride) {
  if (product(rows, width, kWidest) < 0) return ATTS_ERROR_SHAPE;
  return atts::check_strides(rows, 1, width, stride, width, kWidest);
}

template <class T>
void score_tokens(const atts_score_tokens_params& p) {
  const float* hidden = atts::prepared(static_cast<const T*>(p.hidden), p.rows, p.width);
  const auto* weight = static_cast<const T*>(p.weight);
  const int64_t blocks = (p.vocab + atts::kScoreBlock - 1) / atts::kScoreBlock;
  std::vector<float> peaks(static_cast<size_t>(blocks * p.rows)), sums(peaks.size());
  std::vector<float> target(static_cast<size_t>(p.rows));
  parallel(blocks, p.threads, [&](int64_t block) {
    const int64_t first = block * atts::kScoreBlock, left = p.vocab - first;
    const int64_t columns = left < atts::kScoreBlock ? left : atts::kScoreBlock;
    float* logits = atts::scratch(kScoreRows * atts::kScoreBlock);
    for (int64_t at = 0; at < p.rows; at += kScoreRows) {
      const int64_t rows = p.rows - at < kScoreRows ? p.rows - at : kScoreRows;
      atts::dot(hidden + at * p.width, rows, weight, p.packed, first, columns, p.width, logits, atts::kScoreBlock);
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
}

}  // namespace

extern "C" int atts_linear_cpu(const atts_linear_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_linear_params& p = *params;
  if (p.rows < 0 || p.in_features < 1 || p.out_features < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (const int status = atts::check_dtype(p.dtype)) return status;
  if (product(p.rows, p.in_features, kWidest) < 0 || product(p.out_features, p.in_features, kWidest) < 0 ||
      product(p.rows, p.out_features, kWidest) < 0)
    return ATTS_ERROR_SHAPE;
  if (!elements_aligned(p.dtype, p.x, p.weight, p.bias, p.out)) return ATTS_ERROR_ALIGNMENT;
  if (p.rows == 0) return ATTS_OK;
  if (p.x == nullptr || (p.weight == nullptr && p.packed == nullptr) || p.out == nullptr)
    return ATTS_ERROR_NULL_POINTER;
  if (const int status = atts::check_packed(p.packed, p.dtype, p.out_features, p.in_features)) return status;
  atts::linear(p);
  return ATTS_OK;
}

extern "C" int atts_score_tokens_cpu(const atts_score_tokens_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_score_tokens_params& p = *params;
  if (p.rows < 0 || p.width < 1 || p.vocab < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (const int status = atts::check_dtype(p.dtype)) return status;
  if (product(p.rows, p.width, kWidest) < 0 || product(p.vocab, p.width, kWidest) < 0 ||
      product(p.rows, p.vocab, kWidest) < 0)
    return ATTS_ERROR_SHAPE;
  if (!elements_aligned(p.dtype, p.hidden, p.weight) || !all_aligned(p.ids, p.logprob)) return ATTS_ERROR_ALIGNMENT;
  if (p.rows == 0) return ATTS_OK;
  if (p.hidden == nullptr || (p.weight == nullptr && p.packed == nullptr) || p.ids == nullptr || p.logprob == nullptr)
    return ATTS_ERROR_NULL_POINTER;
  if (const int status = atts::check_packed(p.packed, p.dtype, p.vocab, p.width)) return status;
  for (int64_t row = 0; row < p.rows; ++row)
    if (p.ids[row] < 0 || p.ids[row] >= p.vocab) return ATTS_ERROR_KEY;
  atts::with_type(p.dtype, [&](auto element) { score_tokens<decltype(element)>(p); });
  return ATTS_OK;
}

extern "C" int atts_attention_cpu(const atts_attention_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_attention_params& p = *params;
  if (p.rows < 0 || p.batch < 0 || p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads || p.head_dim < 16 ||
      p.head_dim % 16 || p.page < 1 || p.pages < 0 || p.table_width < 0 || p.threads < 1)
    return ATTS_ERROR_SHAPE;
  if (const int status = atts::check_dtype(p.dtype)) return status;
  if (product(p.rows, p.heads, p.head_dim, kWidest) < 0 || product(p.table_width, p.page) < 0 ||
      product(p.batch, p.table_width, sizeof(int32_t)) < 0 ||
      product(2, p.pages, p.page, p.kv_heads, p.head_dim, kWidest) < 0)
    return ATTS_ERROR_SHAPE;
  if (!elements_aligned(p.dtype, p.q, p.kv, p.out) || !all_aligned(p.block_table, p.cu_q, p.kv_len))
    return ATTS_ERROR_ALIGNMENT;
  if (p.cu_q == nullptr || (p.batch > 0 && p.kv_len == nullptr)) return ATTS_ERROR_NULL_POINTER;
  if (p.rows > 0 && (p.q == nullptr || p.kv == nullptr || p.block_table == nullptr || p.out == nullptr))
    return ATTS_ERROR_NULL_POINTER;
  if (const atts_status status = atts::check_attention_batch(p)) return status;
  if (p.rows > 0) atts::attention(p);
  return ATTS_OK;
}

extern "C" int atts_rms_norm_cpu(const atts_rms_norm_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_rms_norm_params& p = *params;
  if (p.rows < 0 || p.width < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (const int status = atts::check_dtype(p.dtype)) return status;
  if (const int status = check_rows(p.rows, p.width, p.x_stride)) return status;
  if (!elements_aligned(p.dtype, p.x, p.delta, p.weight, p.sum, p.out)) return ATTS_ERROR_ALIGNMENT;
  if (p.rows == 0) return ATTS_OK;
  if (p.x == nullptr || p.weight == nullptr || p.out == nullptr || (p.delta == nullptr) != (p.sum == nullptr))
    return ATTS_ERROR_NULL_POINTER;
  atts::rms_norm(p);
  return ATTS_OK;
}

extern "C" int atts_silu_mul_cpu(const atts_silu_mul_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_silu_mul_params& p = *params;
  if (p.rows < 0 || p.width < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (const int status = atts::check_dtype(p.dtype)) return status;
  if (const int status = check_rows(p.rows, p.width, p.gate_stride)) return status;
  if (const int status = check_rows(p.rows, p.width, p.up_stride)) return status;
  if (!elements_aligned(p.dtype, p.gate, p.up, p.out)) return ATTS_ERROR_ALIGNMENT;
  if (p.rows == 0) return ATTS_OK;
  if (p.gate == nullptr || p.up == nullptr || p.out == nullptr) return ATTS_ERROR_NULL_POINTER;
  atts::silu_mul(p);
  return ATTS_OK;
}

extern "C" int atts_rope_cpu(const atts_rope_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_rope_params& p = *params;
  if (p.rows < 0 || p.heads < 1 || p.head_dim < 2 || p.head_dim % 2 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (const int status = atts::check_dtype(p.dtype)) return status;
  const int64_t width = product(p.heads, p.head_dim);
  if (width < 0) return ATTS_ERROR_SHAPE;
  if (const int status = check_rows(p.rows, width, p.row_stride)) return status;
  if (!elements_aligned(p.dtype, p.x, p.out) || !all_aligned(p.cosine, p.sine)) return ATTS_ERROR_ALIGNMENT;
  if (p.rows == 0) return ATTS_OK;
  if (p.x == nullptr || p.cosine == nullptr || p.sine == nullptr || p.out == nullptr) return ATTS_ERROR_NULL_POINTER;
  atts::rope(p);
  return ATTS_OK;
}
