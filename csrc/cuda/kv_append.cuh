// k and v, and q beside them, to where they belong. A warp, or several where a row is long, takes a row: it finds the
// slot once, and its lanes take a vector of a head each, or the two vectors that turn together.
#ifndef ATTS_CUDA_KV_APPEND_CUH_
#define ATTS_CUDA_KV_APPEND_CUH_

#include "cuda/device.cuh"

namespace atts {
namespace {

constexpr int kAppendThreads = 256;
constexpr int kAppendWarps = kAppendThreads / kWarp;
constexpr int kUnitsOfLane = 2;      // two loads under way, and a decode step still fills the device
constexpr int kAppendMaxParts = 16;  // warps of a row: each finds the slot anew

struct AppendLaunch {
  atts_kv_append_params p;
  int units_of_head;  // vectors, or pairs of them where heads are turned
  int units;          // of all heads of a row: keys, values, queries
  unsigned parts;     // warps of a row
};

// The slot of a row, found by a whole warp; -1 where the row has none.
__device__ __forceinline__ int64_t slot_of(const atts_kv_append_params& p, int64_t row) {
  if (p.slots != nullptr) {
    const int64_t slot = p.slots[row];
    if (slot >= -1 && slot < p.slot_count) return slot;
    report(p.error, ATTS_ERROR_KEY);
    return -1;
  }
  // Sequences that end before the row: each lane compares some of the bounds, and no load waits for another.
  unsigned ended = 0;
  for (int64_t b = threadIdx.x % kWarp; b < p.batch; b += kWarp) ended += p.cu_q[b + 1] <= row;
  const int64_t b = __reduce_add_sync(kAllLanes, ended);
  if (b >= p.batch) return -1;
  const int64_t token = p.kv_len[b] - (p.cu_q[b + 1] - row);
  if (token < 0 || token / p.page >= p.table_width) {
    report(p.error, ATTS_ERROR_BATCH);
    return -1;
  }
  const int64_t page = p.block_table[b * p.table_width + token / p.page];
  if (page >= 0 && page < p.slot_count / p.page) return page * p.page + token % p.page;
  report(p.error, ATTS_ERROR_KEY);
  return -1;
}

template <int n>
__device__ __forceinline__ void load_floats(const float* from, float* to) {
  constexpr int m = n < 4 ? n : 4;
#pragma unroll
  for (int i = 0; i < n; i += m) {
    Pack<float, m> some;
    some.load(from + i);
#pragma unroll
    for (int j = 0; j < m; ++j) to[i + j] = some.at[j];
  }
}

template <class Element, int n>
__device__ __forceinline__ void turn(Pack<typename Element::type, n>& low, Pack<typename Element::type, n>& high,
                                     const float* cosine, const float* sine) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float a = Element::widen(low.at[i]), b = Element::widen(high.at[i]);
    // Rounded step by step, as torch does it.
    low.at[i] = Element::narrow(__fsub_rn(__fmul_rn(a, cosine[i]), __fmul_rn(b, sine[i])));
    high.at[i] = Element::narrow(__fadd_rn(__fmul_rn(b, cosine[i]), __fmul_rn(a, sine[i])));
  }
}

// n: elements of a vector, 1 where something is not aligned. Three blocks of a multiprocessor: left to itself ptxas
// aims at four, and spills.
template <class Element, int n, bool turned>
__global__ void __launch_bounds__(kAppendThreads, 3) kv_append_kernel(const __grid_constant__ AppendLaunch launch) {
  using T = typename Element::type;
  const atts_kv_append_params& p = launch.p;
  const unsigned warp = blockIdx.x * kAppendWarps + threadIdx.x / kWarp;
  const int64_t row = warp / launch.parts;
  if (row >= p.rows) return;
  const int64_t slot = slot_of(p, row);
  if (slot < 0) return;

  T* keys = static_cast<T*>(p.kv) + slot * p.kv_heads * p.head_dim;
  T* values = keys + p.slot_count * p.kv_heads * p.head_dim;
  const int kv_heads = static_cast<int>(p.kv_heads);
  const int64_t half = p.head_dim / 2;

#pragma unroll kUnitsOfLane
  for (int unit = warp % launch.parts * kWarp + threadIdx.x % kWarp; unit < launch.units;
       unit += launch.parts * kWarp) {
    int head = unit / launch.units_of_head;
    const int64_t at = static_cast<int64_t>(unit % launch.units_of_head) * n;
    const T* from;
    T* to;
    bool turns = turned;
    if (head < kv_heads) {
      from = static_cast<const T*>(p.k) + row * p.k_stride + head * p.k_head_stride;
      to = keys + head * p.head_dim;
    } else if (head < 2 * kv_heads) {
      head -= kv_heads;
      from = static_cast<const T*>(p.v) + row * p.v_stride + head * p.v_head_stride;
      to = values + head * p.head_dim;
      turns = false;
    } else {
      head -= 2 * kv_heads;
      from = static_cast<const T*>(p.q) + row * p.q_stride + head * p.q_head_stride;
      to = static_cast<T*>(p.q_out) + row * p.q_out_stride + head * p.q_out_head_stride;
    }
    Pack<T, n> low, high;
    low.load(from + at);
    if constexpr (turned) {
      high.load(from + half + at);
      if (turns) {
        float cosine[n], sine[n];
        load_floats<n>(p.cosine + row * half + at, cosine);
        load_floats<n>(p.sine + row * half + at, sine);
        turn<Element, n>(low, high, cosine, sine);
      }
      high.store(to + half + at);
    }
    low.store(to + at);
  }
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CUDA_KV_APPEND_CUH_
