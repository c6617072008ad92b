// The gate in one launch. Block k owns key k: it alone touches ring k, so that counting before inserting needs no order
// between blocks, only a barrier inside one. A warp counts a row; the block then inserts by rank in index order.
#include <cuda_runtime.h>

#include "atts/atts.h"
#include "checks.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ bool inserts(const atts_gate_params& g, int64_t row, int64_t key) {
  return row < g.batch && g.key[row] == key && g.insert[row] && isfinite(g.score[row]);
}

__device__ __forceinline__ void decide(const atts_gate_params& g, int64_t row, int64_t n, int64_t greater, int64_t ties) {
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

__global__ void __launch_bounds__(kThreads) gate_kernel(const __grid_constant__ atts_gate_params g) {
  __shared__ int warp_inserts[kWarps];
  const int64_t key = blockIdx.x;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  float* ring = g.ring + key * g.capacity;
  const int64_t n = g.size[key];
  const int64_t head = g.head[key];

  for (int64_t row = warp; row < g.batch; row += kWarps) {
    if (g.key[row] != key) continue;  // the same for all lanes of the warp
    const float score = g.score[row];
    unsigned greater = 0;
    unsigned ties = 0;
    for (int64_t i = lane; i < n; i += kWarp) {
      const float held = ring[i];
      greater += held > score;
      ties += held == score;
    }
    greater = __reduce_add_sync(kAllLanes, greater);
    ties = __reduce_add_sync(kAllLanes, ties);
    if (lane == 0) decide(g, row, n, greater, ties);
  }

  int64_t arriving = 0;
  for (int64_t first = 0; first < g.batch; first += kThreads) {
    arriving += __syncthreads_count(inserts(g, first + threadIdx.x, key));
  }
  // The counts above and this barrier are behind every read of the ring; a batch of none has nothing to insert.
  __syncthreads();
  if (arriving == 0) return;

  int64_t rank = 0;
  for (int64_t first = 0; first < g.batch; first += kThreads) {
    const int64_t row = first + threadIdx.x;
    const bool mine = inserts(g, row, key);
    const unsigned ballot = __ballot_sync(kAllLanes, mine);
    if (lane == 0) warp_inserts[warp] = __popc(ballot);
    __syncthreads();
    int64_t place = rank + __popc(ballot & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += warp_inserts[w];
      rank += warp_inserts[w];
    }
    // More arrivals than the ring holds: those that later ones would overwrite are not written at all.
    if (mine && place >= arriving - g.capacity) ring[(head + place) % g.capacity] = g.score[row];
    __syncthreads();  // warp_inserts is written again
  }
  if (threadIdx.x == 0) {
    g.head[key] = (head + arriving) % g.capacity;
    g.size[key] = min(n + arriving, g.capacity);
  }
}

}  // namespace

extern "C" int atts_has_cuda(void) { return 1; }

extern "C" int atts_gate(const atts_gate_params* params, void* stream) {
  if (const atts_status status = atts::check_gate(params)) return status;
  if (params->batch == 0) return ATTS_OK;
  if (params->keys > INT32_MAX) return ATTS_ERROR_SHAPE;
  gate_kernel<<<static_cast<unsigned>(params->keys), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*params);
  return cudaGetLastError() == cudaSuccess ? ATTS_OK : ATTS_ERROR_CUDA;
}
