// What every launcher does on the host.
#ifndef ATTS_CUDA_LAUNCH_H_
#define ATTS_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "atts/atts.h"

namespace atts {

inline atts_status cuda_status(cudaError_t error) {
  if (error == cudaSuccess) return ATTS_OK;
  cudaGetLastError();  // or the caller's next check finds an error that was reported here
  return ATTS_ERROR_CUDA;
}

// A pointer of the host, or of another device, would fail inside the kernel and take the context with it.
inline atts_status check_device(const void* pointer) {
  int device = 0;
  cudaPointerAttributes attributes{};
  if (const atts_status status = cuda_status(cudaGetDevice(&device))) return status;
  if (const atts_status status = cuda_status(cudaPointerGetAttributes(&attributes, pointer))) return status;
  if (attributes.type == cudaMemoryTypeManaged) return ATTS_OK;
  return attributes.type == cudaMemoryTypeDevice && attributes.device == device ? ATTS_OK : ATTS_ERROR_DEVICE;
}

// One-dimensional launch. `behind`: the kernel may start before the one ahead of it in the stream has ended, and waits
// for it itself (wait_for_kernel_ahead).
template <class Params>
atts_status launch(void (*kernel)(Params), int64_t blocks, int threads, void* stream, const Params& params,
                   bool behind = false) {
  if (blocks > INT32_MAX) return ATTS_ERROR_SHAPE;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = behind ? 1 : 0;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, params));
}

// Whether the code that this device runs of a kernel can wait for the kernel ahead.
template <class Params>
bool can_run_behind(void (*kernel)(Params)) {
  cudaFuncAttributes attributes{};
  return cuda_status(cudaFuncGetAttributes(&attributes, kernel)) == ATTS_OK && attributes.ptxVersion >= 90;
}

}  // namespace atts

#endif  // ATTS_CUDA_LAUNCH_H_
