// A warp per span: it reads 32 tokens side by side, and adds them one after the other as the contract has it.
#ifndef ATTS_CUDA_SPAN_MEAN_CUH_
#define ATTS_CUDA_SPAN_MEAN_CUH_

#include "cuda/device.cuh"

namespace atts {
namespace {

constexpr int kSpanThreads = 128;
constexpr int kSpanWarps = kSpanThreads / kWarp;

__global__ void __launch_bounds__(kSpanThreads) span_mean_kernel(const __grid_constant__ atts_span_mean_params p) {
  wait_for_kernel_ahead();
  const int lane = threadIdx.x % kWarp;
  const int64_t span = static_cast<int64_t>(blockIdx.x) * kSpanWarps + threadIdx.x / kWarp;
  if (span >= p.batch) return;
  const int64_t first = p.cu_seqlens[span], last = p.cu_seqlens[span + 1];
  if (first < 0 || last <= first || last > p.tokens) {
    if (lane == 0) {
      report(p.error, ATTS_ERROR_BATCH);
      p.sum[span] = __longlong_as_double(0x7ff8000000000000LL);
      p.score[span] = __int_as_float(0x7fc00000);
    }
    return;
  }
  double total = 0.0;
  // Adding the 0 of a lane without a token moves nothing: the sum starts at +0 and so never is -0.
  float next = first + lane < last ? p.logprob[first + lane] : 0.0f;
  for (int64_t at = first; at < last; at += kWarp) {
    const float value = next;
    next = at + kWarp + lane < last ? p.logprob[at + kWarp + lane] : 0.0f;
#pragma unroll
    for (int i = 0; i < kWarp; ++i) total += static_cast<double>(__shfl_sync(kAllLanes, value, i));
  }
  if (lane != 0) return;
  p.sum[span] = total;
  p.score[span] = static_cast<float>(-total / static_cast<double>(last - first));
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CUDA_SPAN_MEAN_CUH_
