#include "cuda/span_mean.cuh"

#include "checks.h"
#include "cuda/launch.h"
#include "cuda/span_mean.h"

namespace atts {

atts_status launch_span_mean(const atts_span_mean_params& params, void* stream, bool behind) {
  const int64_t blocks = (params.batch - 1) / kSpanWarps + 1;
  return launch(span_mean_kernel, blocks, kSpanThreads, stream, params, behind && can_run_behind(span_mean_kernel));
}

}  // namespace atts

extern "C" int atts_span_mean(const atts_span_mean_params* params, void* stream) {
  if (const atts_status status = atts::check_span_mean(params)) return status;
  if (params->batch == 0) return ATTS_OK;
  if (const atts_status status = atts::check_device(params->cu_seqlens)) return status;
  return atts::launch_span_mean(*params, stream, false);
}
