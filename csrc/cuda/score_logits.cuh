// Log-probabilities of logits in one read. A row is cut into parts that a block holds in registers as a whole: the
// largest value first, then the exponentials against it, so that nothing is read or rescaled twice. Parts are merged in
// order, by the block that went through all of them or by the last of those that shared the row: the bits are the same.
#ifndef ATTS_CUDA_SCORE_LOGITS_CUH_
#define ATTS_CUDA_SCORE_LOGITS_CUH_

#include "cuda/device.cuh"
#include "plan.h"

namespace atts {
namespace {

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / kWarp;
constexpr int kScoreVectors = kPartBytes / kVectorBytes / kScoreThreads;  // of a part, for each thread
static_assert(kScoreVectors * kVectorBytes * kScoreThreads == kPartBytes);

struct ScoreLaunch {
  atts_score_logits_params p;
  int64_t parts;      // of a row
  unsigned shares;    // blocks of a row: 1, or as many as parts
  Part* partial;      // [rows, parts]; with shares > 1
  uint32_t* tickets;  // [rows], 0 between launches; with shares > 1
};

__device__ __forceinline__ float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// What exponents are taken against. Where all values are -inf it is 0, for -inf less itself is NaN.
__device__ __forceinline__ float anchor_of(float peak) { return peak == minus_infinity() ? 0.0f : peak; }

__device__ __forceinline__ Part merge(const Part& a, const Part& b) {
  const float peak = fmaxf(a.peak, b.peak), anchor = anchor_of(peak);
  return {peak, a.sum * __expf(a.peak - anchor) + b.sum * __expf(b.peak - anchor)};
}

struct ScoreShared {
  float peaks[kScoreWarps], sums[kScoreWarps];
};

// The same for every instance of the kernel.
__device__ __forceinline__ ScoreShared& shared_of_block() {
  __shared__ ScoreShared shared;
  return shared;
}

// Elements first .. of a row, as many as a part has, those behind the vocabulary as -inf. Every thread returns the
// part. fmaxf passes NaN over; the sum does not.
template <class Element, bool aligned>
__device__ __forceinline__ Part sum_part(const typename Element::type* row, int64_t first, int64_t vocab,
                                         ScoreShared& shared) {
  using T = typename Element::type;
  constexpr int n = kVectorBytes / sizeof(T);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Pack<T, n> held[kScoreVectors];
#pragma unroll
  for (int j = 0; j < kScoreVectors; ++j) {
    const int64_t at = first + static_cast<int64_t>(j * kScoreThreads + threadIdx.x) * n;
    if (aligned && at + n <= vocab) {
      held[j].load(row + at);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) held[j].at[i] = at + i < vocab ? row[at + i] : Element::narrow(minus_infinity());
    }
  }
  float peak = minus_infinity();
#pragma unroll
  for (int j = 0; j < kScoreVectors; ++j) {
#pragma unroll
    for (int i = 0; i < n; ++i) peak = fmaxf(peak, Element::widen(held[j].at[i]));
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, step));
  if (lane == 0) shared.peaks[warp] = peak;
  __syncthreads();
  for (int w = 0; w < kScoreWarps; ++w) peak = fmaxf(peak, shared.peaks[w]);
  const float anchor = anchor_of(peak);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kScoreVectors; ++j) {
#pragma unroll
    for (int i = 0; i < n; ++i) sum += __expf(Element::widen(held[j].at[i]) - anchor);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane == 0) shared.sums[warp] = sum;
  // The next part writes peaks behind this barrier and sums behind the one above, so neither is written while it is
  // read.
  __syncthreads();
  sum = 0.0f;
  for (int w = 0; w < kScoreWarps; ++w) sum += shared.sums[w];
  return {peak, sum};
}

template <class Element>
__global__ void __launch_bounds__(kScoreThreads) score_logits_kernel(const __grid_constant__ ScoreLaunch launch) {
  using T = typename Element::type;
  ScoreShared& shared = shared_of_block();
  let_kernel_behind_start();
  const atts_score_logits_params& p = launch.p;
  const int64_t row = blockIdx.x / launch.shares, share = blockIdx.x % launch.shares;
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
  const int64_t id = p.ids[row];
  const bool known = id >= 0 && id < p.vocab;
  // One sector of a row that is read anyway.
  const float target = known ? Element::widen(logits[id]) : __int_as_float(0x7fc00000);
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % kVectorBytes == 0;

  constexpr int64_t kElements = kPartBytes / static_cast<int64_t>(sizeof(T));
  Part total{minus_infinity(), 0.0f};
  for (int64_t part = share; part < launch.parts; part += launch.shares) {
    const Part one = aligned ? sum_part<Element, true>(logits, part * kElements, p.vocab, shared)
                             : sum_part<Element, false>(logits, part * kElements, p.vocab, shared);
    total = merge(total, one);
  }
  if (threadIdx.x != 0) return;
  if (launch.shares > 1) {
    Part* partial = launch.partial + row * launch.parts;
    partial[share] = total;
    __threadfence();  // the part before the ticket
    if (atomicAdd(launch.tickets + row, 1u) + 1 != launch.shares) return;
    __threadfence();
    launch.tickets[row] = 0;
    total = {minus_infinity(), 0.0f};
    for (int64_t part = 0; part < launch.parts; ++part)
      total = merge(total, {__ldcg(&partial[part].peak), __ldcg(&partial[part].sum)});
  }
  if (!known) report(p.error, ATTS_ERROR_KEY);
  p.logprob[row] = (target - total.peak) - logf(total.sum);
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CUDA_SCORE_LOGITS_CUH_
