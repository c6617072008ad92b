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

// Where one vector of a row, or a pair of them, comes from and goes to.
template <class T>
struct AppendUnit {
  const T* from;
  T* to;
  int64_t at;  // in its head
  bool turns;
};

template <class T>
__device__ __forceinline__ AppendUnit<T> unit_of(const AppendLaunch& launch, int64_t row, int64_t slot, int unit,
                                                 int n) {
  const atts_kv_append_params& p = launch.p;
  const int kv_heads = static_cast<int>(p.kv_heads);
  T* keys = static_cast<T*>(p.kv) + slot * p.kv_heads * p.head_dim;
  const int head = unit / launch.units_of_head;
  const int64_t at = static_cast<int64_t>(unit % launch.units_of_head) * n;
  if (head < kv_heads) {
    const T* k = static_cast<const T*>(p.k) + row * p.k_stride + head * p.k_head_stride;
    return {k + at, keys + head * p.head_dim + at, at, true};
  }
  if (head < 2 * kv_heads) {
    const T* v = static_cast<const T*>(p.v) + row * p.v_stride + (head - kv_heads) * p.v_head_stride;
    T* values = keys + p.slot_count * p.kv_heads * p.head_dim;
    return {v + at, values + (head - kv_heads) * p.head_dim + at, at, false};
  }
  const int64_t query = head - 2 * kv_heads;
  const T* q = static_cast<const T*>(p.q) + row * p.q_stride + query * p.q_head_stride;
  T* q_out = static_cast<T*>(p.q_out) + row * p.q_out_stride + query * p.q_out_head_stride;
  return {q + at, q_out + at, at, true};
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

  const int64_t half = p.head_dim / 2;
  const int step = static_cast<int>(launch.parts) * kWarp;
  for (int first = warp % launch.parts * kWarp + threadIdx.x % kWarp; first < launch.units;
       first += kUnitsOfLane * step) {
    AppendUnit<T> unit[kUnitsOfLane];
    Pack<T, n> low[kUnitsOfLane], high[kUnitsOfLane];
    // All loads before the first store: the compiler cannot know that q_out, which may be q, is written elsewhere.
#pragma unroll
    for (int j = 0; j < kUnitsOfLane; ++j) {
      if (first + j * step >= launch.units) break;
      unit[j] = unit_of<T>(launch, row, slot, first + j * step, n);
      low[j].load(unit[j].from);
      if constexpr (turned) high[j].load(unit[j].from + half);
    }
#pragma unroll
    for (int j = 0; j < kUnitsOfLane; ++j) {
      if (first + j * step >= launch.units) break;
      if constexpr (turned) {
        if (unit[j].turns) {
          float cosine[n], sine[n];
          load_floats<n>(p.cosine + row * half + unit[j].at, cosine);
          load_floats<n>(p.sine + row * half + unit[j].at, sine);
          turn<Element, n>(low[j], high[j], cosine, sine);
        }
        high[j].store(unit[j].to + half);
      }
      low[j].store(unit[j].to);
    }
  }
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CUDA_KV_APPEND_CUH_
