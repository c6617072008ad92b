#include "cuda/score_logits.cuh"

#include "cuda/launch.h"
#include "cuda/span_mean.h"

namespace atts {
namespace {

atts_status launch_rows(const atts_score_logits_params& p, void* stream) {
  ScoreLaunch work{p, score_parts(p.vocab, p.dtype), 1, nullptr, nullptr};
  const int64_t bytes = p.workspace == nullptr ? 0 : score_workspace(p.rows, p.vocab, p.dtype);
  if (bytes < 0) return ATTS_ERROR_SHAPE;
  if (bytes > 0) {
    if (!aligned(p.workspace, 16)) return ATTS_ERROR_ALIGNMENT;
    if (p.workspace_bytes < static_cast<uint64_t>(bytes)) return ATTS_ERROR_WORKSPACE;
    if (work.parts > INT32_MAX) return ATTS_ERROR_SHAPE;
    work.shares = static_cast<unsigned>(work.parts);
    work.tickets = static_cast<uint32_t*>(p.workspace);
    work.partial = reinterpret_cast<Part*>(static_cast<char*>(p.workspace) + kScoreTicketBytes);
  }
  if (const atts_status status = check_device(p.logits)) return status;
  const int64_t blocks = p.rows * work.shares;
  if (p.dtype == ATTS_FLOAT32) return launch(score_logits_kernel<Float32>, blocks, kScoreThreads, stream, work);
  if (p.dtype == ATTS_FLOAT16) return launch(score_logits_kernel<Float16>, blocks, kScoreThreads, stream, work);
  return launch(score_logits_kernel<Bfloat16>, blocks, kScoreThreads, stream, work);
}

}  // namespace
}  // namespace atts

extern "C" int atts_score_logits(const atts_score_logits_params* params, void* stream) {
  if (const atts_status status = atts::check_score_logits(params)) return status;
  const atts_score_logits_params& p = *params;
  if (p.rows > 0)
    if (const atts_status status = atts::launch_rows(p, stream)) return status;
  if (p.batch == 0) return ATTS_OK;
  const atts_span_mean_params spans{sizeof(atts_span_mean_params), p.logprob, p.cu_seqlens, p.score, p.sum, p.error,
                                    p.rows, p.batch};
  return atts::launch_span_mean(spans, stream, p.rows > 0);
}
