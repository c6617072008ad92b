// Pages between places of a cache, or between a cache and a dense array. A piece is one page of one plane, a plane
// being the keys or the values of a layer; a block copies a chunk of a piece, all loads before the first store.
#ifndef ATTS_CUDA_KV_PAGES_CUH_
#define ATTS_CUDA_KV_PAGES_CUH_

#include "cuda/device.cuh"

namespace atts {
namespace {

constexpr int kPageThreads = 256;
constexpr int kPageLoads = 8;  // of a thread, under way at once
constexpr int kPageChunk = kPageThreads * kPageLoads;

// One end of a copy: page i of a dense array, or page ids[i] of the cache.
struct PageEnd {
  char* base;
  const int64_t* ids;           // NULL for a dense array
  int64_t page_bytes_apart;     // from page to page of a plane
  int64_t plane_bytes_apart;    // from plane to plane of a page
};

struct PageLaunch {
  PageEnd from, to;
  int64_t pages;
  int64_t units;  // of a piece
  unsigned planes;
  unsigned chunks;  // of a piece
  int32_t* error;
};

// Where page i of a plane begins; NULL where the cache has no such page.
__device__ __forceinline__ char* place_of(const PageEnd& end, int64_t i, int64_t plane, int64_t pages, int32_t* error) {
  const int64_t page = end.ids == nullptr ? i : end.ids[i];
  if (end.ids != nullptr && (page < 0 || page >= pages)) {
    report(error, ATTS_ERROR_KEY);
    return nullptr;
  }
  return end.base + page * end.page_bytes_apart + plane * end.plane_bytes_apart;
}

template <class Unit>
__global__ void __launch_bounds__(kPageThreads) kv_pages_kernel(const __grid_constant__ PageLaunch launch) {
  const unsigned piece = blockIdx.x / launch.chunks, chunk = blockIdx.x % launch.chunks;
  const unsigned i = piece / launch.planes, plane = piece % launch.planes;
  const Unit* from = reinterpret_cast<const Unit*>(place_of(launch.from, i, plane, launch.pages, launch.error));
  Unit* to = reinterpret_cast<Unit*>(place_of(launch.to, i, plane, launch.pages, launch.error));
  if (from == nullptr || to == nullptr) return;
  const int64_t first = static_cast<int64_t>(chunk) * kPageChunk + threadIdx.x;
  Unit held[kPageLoads];
#pragma unroll
  for (int j = 0; j < kPageLoads; ++j)
    if (first + j * kPageThreads < launch.units) held[j] = from[first + j * kPageThreads];
#pragma unroll
  for (int j = 0; j < kPageLoads; ++j)
    if (first + j * kPageThreads < launch.units) to[first + j * kPageThreads] = held[j];
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CUDA_KV_PAGES_CUH_
