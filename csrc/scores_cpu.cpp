// Scores of logits and of spans on the host.
#include <cstring>

#include "atts/atts.h"
#include "checks.h"
#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/logprob.h"
#include "cpu/parallel.h"

namespace atts {
namespace {

using namespace host;

atts_status check_spans(const int64_t* cu_seqlens, int64_t batch, int64_t tokens) {
  if (cu_seqlens[0] != 0 || cu_seqlens[batch] != tokens) return ATTS_ERROR_BATCH;
  for (int64_t b = 0; b < batch; ++b)
    if (cu_seqlens[b + 1] <= cu_seqlens[b]) return ATTS_ERROR_BATCH;
  return ATTS_OK;
}

void span_means(const float* logprob, const int64_t* cu_seqlens, int64_t batch, float* score, double* sum) {
  for (int64_t b = 0; b < batch; ++b) {
    double total = 0.0;
    for (int64_t i = cu_seqlens[b]; i < cu_seqlens[b + 1]; ++i) total += static_cast<double>(logprob[i]);
    sum[b] = total;
    score[b] = static_cast<float>(-total / static_cast<double>(cu_seqlens[b + 1] - cu_seqlens[b]));
  }
}

void widen(Bfloat16, const uint16_t* from, int64_t n, float* to) { kernels().widen(from, n, to); }
void widen(Float32, const float* from, int64_t n, float* to) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof *to);
}
void widen(Float16, const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = Float16::widen(from[i]);
}

template <class Element>
void score_row(const atts_score_logits_params& p, int64_t row) {
  const auto* logits = static_cast<const typename Element::type*>(p.logits) + row * p.logits_stride;
  const int64_t blocks = (p.vocab + kScoreBlock - 1) / kScoreBlock;
  float* peaks = scratch(2 * blocks + kScoreBlock);
  float *sums = peaks + blocks, *values = sums + blocks;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kScoreBlock, left = p.vocab - first;
    const int64_t columns = left < kScoreBlock ? left : kScoreBlock;
    widen(Element{}, logits + first, columns, values);
    kernels().softmax_parts(values, columns, peaks + block, sums + block);
  }
  p.logprob[row] = logprob_of(Element::widen(logits[p.ids[row]]), peaks, sums, blocks, 1);
}

}  // namespace
}  // namespace atts

extern "C" int atts_span_mean_cpu(const atts_span_mean_params* params) {
  if (const atts_status status = atts::check_span_mean(params)) return status;
  const atts_span_mean_params& p = *params;
  if (const atts_status status = atts::check_spans(p.cu_seqlens, p.batch, p.tokens)) return status;
  atts::span_means(p.logprob, p.cu_seqlens, p.batch, p.score, p.sum);
  return ATTS_OK;
}

extern "C" int atts_score_logits_cpu(const atts_score_logits_params* params) {
  if (const atts_status status = atts::check_score_logits(params)) return status;
  const atts_score_logits_params& p = *params;
  if (p.threads < 1) return ATTS_ERROR_SHAPE;
  for (int64_t row = 0; row < p.rows; ++row)
    if (p.ids[row] < 0 || p.ids[row] >= p.vocab) return ATTS_ERROR_KEY;
  if (p.cu_seqlens != nullptr)
    if (const atts_status status = atts::check_spans(p.cu_seqlens, p.batch, p.rows)) return status;
  atts::host::with_element(p.dtype, [&](auto element) {
    atts::parallel(p.rows, p.threads, [&](int64_t row) { atts::score_row<decltype(element)>(p, row); });
  });
  if (p.cu_seqlens != nullptr) atts::span_means(p.logprob, p.cu_seqlens, p.batch, p.score, p.sum);
  return ATTS_OK;
}
