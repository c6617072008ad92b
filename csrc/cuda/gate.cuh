// The gate in one launch. An owner looks after one key, whose ring it alone touches; `splits` blocks count a part of
// that ring each for all rows of the key. The last of them to finish decides and inserts, so that nothing is inserted
// before everything is counted, and no block waits for another.
#ifndef ATTS_CUDA_GATE_CUH_
#define ATTS_CUDA_GATE_CUH_

#include "cuda/device.cuh"

namespace atts {
namespace {

constexpr int kGateThreads = 256;
constexpr int kGateWarps = kGateThreads / kWarp;

struct GateLaunch {
  atts_gate_params g;
  // Blocks of an owner; above 1 the next two are there, and are 0 between launches.
  unsigned splits;
  unsigned long long* counts;  // [batch], greater in the upper half and ties in the lower
  uint32_t* tickets;           // [owners]
};

struct GateStore {
  int64_t key, n, head;
  float* ring;
  bool sound;  // n and head are inside the ring
};

__device__ __forceinline__ bool gate_accepts(const atts_gate_params& g, const GateStore& store, int64_t row) {
  if (row >= g.batch || g.key[row] != store.key) return false;
  const int64_t level = g.level[row], u = g.u[row];
  if (!store.sound) report(g.error, ATTS_ERROR_STORE);
  const bool in_range = level >= 0 && level <= ATTS_LEVEL_ONE && u >= 1 && u <= ATTS_LEVEL_ONE;
  if (!in_range) report(g.error, ATTS_ERROR_VALUE);
  return store.sound && in_range;
}

__device__ __forceinline__ bool gate_inserts(const atts_gate_params& g, const GateStore& store, int64_t row) {
  return gate_accepts(g, store, row) && g.insert[row] && isfinite(g.score[row]);
}

struct GateRows {
  int of_warp[kGateWarps];
  int listed[kGateThreads];  // rows, in ascending order, from the first of the call on
};

// Lists the threads whose row is `mine`, and returns how many. The first barrier also ends every use of the list
// before.
__device__ __forceinline__ int list_rows(GateRows& rows, bool mine) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned ballot = __ballot_sync(kAllLanes, mine);
  if (lane == 0) rows.of_warp[warp] = __popc(ballot);
  __syncthreads();
  int place = __popc(ballot & ((1u << lane) - 1u)), all = 0;
  for (int w = 0; w < kGateWarps; ++w) {
    if (w < warp) place += rows.of_warp[w];
    all += rows.of_warp[w];
  }
  if (mine) rows.listed[place] = threadIdx.x;
  __syncthreads();
  return all;
}

// Entries first .. last-1 above the score and equal to it, by one warp; `first` is a multiple of 4.
__device__ __forceinline__ void count_entries(const float* ring, int64_t first, int64_t last, float score,
                                              unsigned* greater, unsigned* ties) {
  const int lane = threadIdx.x % kWarp;
  unsigned above = 0, equal = 0;
  int64_t done = first;
  if (reinterpret_cast<uintptr_t>(ring) % kVectorBytes == 0) {
    done = first + (last - first) / 4 * 4;
#pragma unroll 4
    for (int64_t i = first + 4 * lane; i < done; i += 4 * kWarp) {
      const float4 held = *reinterpret_cast<const float4*>(ring + i);
      above += (held.x > score) + (held.y > score) + (held.z > score) + (held.w > score);
      equal += (held.x == score) + (held.y == score) + (held.z == score) + (held.w == score);
    }
  }
  for (int64_t i = done + lane; i < last; i += kWarp) {
    const float held = ring[i];
    above += held > score;
    equal += held == score;
  }
  *greater = __reduce_add_sync(kAllLanes, above);
  *ties = __reduce_add_sync(kAllLanes, equal);
}

__device__ __forceinline__ void decide(const atts_gate_params& g, int64_t row, int64_t n, int64_t greater,
                                       int64_t ties) {
  const bool finite = isfinite(g.score[row]);
  const int64_t u = g.u[row];
  g.n[row] = n;
  g.greater[row] = finite ? greater : -1;
  g.ties[row] = finite ? ties : 0;
  g.takeover[row] = finite && greater * ATTS_LEVEL_ONE + u * (1 + ties) <= g.level[row] * (n + 1);
  // Rounded step by step: a fused multiply-add would move the last bit against the other implementations.
  const double share = __dmul_rn(__ll2double_rn(u), 1.0 / static_cast<double>(ATTS_LEVEL_ONE));
  const double random_part = __dmul_rn(share, __ll2double_rn(1 + ties));
  const double p = __ddiv_rn(__dadd_rn(__ll2double_rn(greater), random_part), __ll2double_rn(n + 1));
  g.p[row] = finite ? p : __longlong_as_double(0x7ff8000000000000LL);
}

// What a row gets that cannot be counted: what a score that is NaN gets, of a ring that is empty.
__device__ __forceinline__ void refuse(const atts_gate_params& g, int64_t row) {
  g.n[row] = 0;
  g.greater[row] = -1;
  g.ties[row] = 0;
  g.takeover[row] = 0;
  g.p[row] = __longlong_as_double(0x7ff8000000000000LL);
}

// Appends in index order; of more arrivals than the ring holds, those that later ones would overwrite are not written.
__device__ __forceinline__ void insert_rows(const atts_gate_params& g, const GateStore& store, GateRows& rows) {
  int64_t arriving = 0;
  // The first of these barriers has every read of the ring behind it.
  for (int64_t first = 0; first < g.batch; first += kGateThreads)
    arriving += __syncthreads_count(gate_inserts(g, store, first + threadIdx.x));
  if (arriving == 0) return;
  int64_t before = 0;
  for (int64_t first = 0; first < g.batch; first += kGateThreads) {
    const int count = list_rows(rows, gate_inserts(g, store, first + threadIdx.x));
    if (static_cast<int>(threadIdx.x) < count) {
      const int64_t place = before + threadIdx.x;
      if (place >= arriving - g.capacity)
        store.ring[(store.head + place) % g.capacity] = g.score[first + rows.listed[threadIdx.x]];
    }
    before += count;
  }
  if (threadIdx.x == 0) {
    g.head[store.key] = (store.head + arriving) % g.capacity;
    g.size[store.key] = min(store.n + arriving, g.capacity);
  }
}

// Two blocks of a multiprocessor: left to itself ptxas aims at four, and spills.
__global__ void __launch_bounds__(kGateThreads, 2) gate_kernel(const __grid_constant__ GateLaunch launch) {
  __shared__ GateRows rows;
  __shared__ bool is_last;
  const atts_gate_params& g = launch.g;
  const int64_t owner = blockIdx.x / launch.splits, split = blockIdx.x % launch.splits;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  GateStore store;
  store.key = owner;
  if (g.keys > g.batch) {  // as many owners as rows: the first row of a key has it
    store.key = g.key[owner];
    bool earlier = false;
    for (int64_t row = threadIdx.x; row < owner; row += kGateThreads) earlier |= g.key[row] == store.key;
    if (__syncthreads_or(earlier)) return;
  }
  if (blockIdx.x == 0) {
    for (int64_t row = threadIdx.x; row < g.batch; row += kGateThreads) {
      if (g.key[row] >= 0 && g.key[row] < g.keys) continue;
      report(g.error, ATTS_ERROR_KEY);
      refuse(g, row);
    }
  }
  if (store.key < 0 || store.key >= g.keys) return;
  store.ring = g.ring + store.key * g.capacity;
  store.n = g.size[store.key];
  store.head = g.head[store.key];
  store.sound = store.n >= 0 && store.n <= g.capacity && store.head >= 0 && store.head < g.capacity;

  const int64_t held = store.sound ? store.n : 0;
  const int64_t part = ((held + launch.splits - 1) / launch.splits + 3) / 4 * 4;
  const int64_t first_entry = min(split * part, held), last_entry = min(first_entry + part, held);
  for (int64_t first = 0; first < g.batch; first += kGateThreads) {
    const int64_t own = first + threadIdx.x;
    const bool accepted = gate_accepts(g, store, own);
    if (split == 0 && !accepted && own < g.batch && g.key[own] == store.key) refuse(g, own);
    const int count = list_rows(rows, accepted);
    for (int i = warp; i < count; i += kGateWarps) {
      const int64_t row = first + rows.listed[i];
      unsigned greater, ties;
      count_entries(store.ring, first_entry, last_entry, g.score[row], &greater, &ties);
      if (lane != 0) continue;
      if (launch.splits == 1) {
        decide(g, row, held, greater, ties);
      } else if (greater != 0 || ties != 0) {
        atomicAdd(launch.counts + row, static_cast<unsigned long long>(greater) << 32 | ties);
      }
    }
  }
  if (launch.splits > 1) {
    __threadfence();  // the counts before the ticket
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(launch.tickets + owner, 1u) + 1 == launch.splits;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) launch.tickets[owner] = 0;
    for (int64_t row = threadIdx.x; row < g.batch; row += kGateThreads) {
      if (!gate_accepts(g, store, row)) continue;
      const unsigned long long both = atomicExch(launch.counts + row, 0ull);
      decide(g, row, held, static_cast<int64_t>(both >> 32), static_cast<int64_t>(both & 0xffffffffu));
    }
  }
  insert_rows(g, store, rows);
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CUDA_GATE_CUH_
