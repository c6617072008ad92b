// Pages to pinned host memory and back by the copy engines. A page is one piece of each plane on the device, and one
// piece in all on the host.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>

#include "checks.h"
#include "cuda/launch.h"

namespace atts {
namespace {

constexpr size_t kBatch = 256;              // pieces handed to the driver at a time; three lists of them on the stack
constexpr int64_t kMaxPitch = (1LL << 31) - 1;  // what every device takes (cudaDeviceProp::memPitch)

struct Swap {
  const atts_kv_swap_params& p;
  Pool pool;

  char* device_piece(int64_t i, int64_t plane) const {
    return static_cast<char*>(p.kv) + (plane * pool.pages + p.page_ids[i]) * pool.page_bytes;
  }
  char* host_piece(int64_t i, int64_t plane) const {
    return static_cast<char*>(p.host) + (p.slots[i] * pool.planes + plane) * pool.page_bytes;
  }
};

atts_status check_pinned(const void* pointer) {
  cudaPointerAttributes attributes{};
  if (const atts_status status = cuda_status(cudaPointerGetAttributes(&attributes, pointer))) return status;
  return attributes.type == cudaMemoryTypeHost ? ATTS_OK : ATTS_ERROR_DEVICE;
}

#if CUDART_VERSION >= 12080
// The form of CUDA 12.8, which every later driver has too. By name and version, so that the library also loads, and
// takes the other way, where the driver is older than what it was built with.
using BatchCopy = CUresult(CUDAAPI*)(CUdeviceptr*, CUdeviceptr*, size_t*, size_t, CUmemcpyAttributes*, size_t*, size_t,
                                     size_t*, CUstream);

BatchCopy batch_copy() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuMemcpyBatchAsync", &entry, 12080, cudaEnableDefault, &found);
  if (cuda_status(error) || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<BatchCopy>(entry);
}

atts_status copy_batched(const Swap& swap, BatchCopy copy, cudaStream_t stream) {
  CUdeviceptr to[kBatch], from[kBatch];
  size_t sizes[kBatch], filled = 0;
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  size_t first = 0, failed = 0;
  const int64_t pieces = swap.p.count * swap.pool.planes;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t i = piece / swap.pool.planes, plane = piece % swap.pool.planes;
    const auto device = reinterpret_cast<CUdeviceptr>(swap.device_piece(i, plane));
    const auto host = reinterpret_cast<CUdeviceptr>(swap.host_piece(i, plane));
    to[filled] = swap.p.to_host ? host : device;
    from[filled] = swap.p.to_host ? device : host;
    sizes[filled++] = static_cast<size_t>(swap.pool.page_bytes);
    if (filled < kBatch && piece + 1 < pieces) continue;
    if (copy(to, from, sizes, filled, &attributes, &first, 1, &failed, stream) != CUDA_SUCCESS) return ATTS_ERROR_CUDA;
    filled = 0;
  }
  return ATTS_OK;
}

// The driver refuses the legacy default stream, and a stream that is being captured.
bool takes_batches(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy) return false;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusActive;
  return cuda_status(cudaStreamIsCapturing(stream, &capture)) == ATTS_OK && capture == cudaStreamCaptureStatusNone;
}
#endif

atts_status copy_page(const Swap& swap, int64_t i, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(swap.pool.page_bytes), planes = static_cast<size_t>(swap.pool.planes);
  const cudaMemcpyKind kind = swap.p.to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
  const int64_t pitch = swap.pool.pages * swap.pool.page_bytes;
  if (pitch <= kMaxPitch) {  // the page of all planes is one rectangle
    char *device = swap.device_piece(i, 0), *host = swap.host_piece(i, 0);
    const auto apart = static_cast<size_t>(pitch);
    return cuda_status(swap.p.to_host ? cudaMemcpy2DAsync(host, bytes, device, apart, bytes, planes, kind, stream)
                                      : cudaMemcpy2DAsync(device, apart, host, bytes, bytes, planes, kind, stream));
  }
  for (int64_t plane = 0; plane < swap.pool.planes; ++plane) {
    char *device = swap.device_piece(i, plane), *host = swap.host_piece(i, plane);
    char *to = swap.p.to_host ? host : device, *from = swap.p.to_host ? device : host;
    if (const atts_status status = cuda_status(cudaMemcpyAsync(to, from, bytes, kind, stream))) return status;
  }
  return ATTS_OK;
}

}  // namespace
}  // namespace atts

extern "C" int atts_kv_swap(const atts_kv_swap_params* params, void* stream) {
  if (const atts_status status = atts::check_kv_swap(params)) return status;
  const atts_kv_swap_params& p = *params;
  if (p.count == 0) return ATTS_OK;
  const atts::Swap swap{p, atts::pool_of(p)};
  if (atts::product(p.count, swap.pool.planes) < 0) return ATTS_ERROR_SHAPE;
  if (const atts_status status = atts::check_device(p.kv)) return status;
  if (const atts_status status = atts::check_pinned(p.host)) return status;
  const auto queue = static_cast<cudaStream_t>(stream);
#if CUDART_VERSION >= 12080
  if (atts::takes_batches(queue))
    if (const atts::BatchCopy copy = atts::batch_copy()) return atts::copy_batched(swap, copy, queue);
#endif
  for (int64_t i = 0; i < p.count; ++i)
    if (const atts_status status = atts::copy_page(swap, i, queue)) return status;
  return ATTS_OK;
}
