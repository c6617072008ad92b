// A CUDA of the host, for tests: the sources of csrc/ compile against this header with a C++ compiler, and their
// kernels run on the CPU. tests/cuda_host/run.cpp runs a grid: a few blocks at a time, taken in random order; in a
// block every thread is a fiber, and warps go on in random order from one barrier to the next, the lanes of a warp
// likewise between two of its collective operations. A missing barrier then gives a wrong result for some seed.
//
// What is not here: warps that interleave between two barriers, weakly ordered memory, tensor cores, asynchronous
// copies, clusters.
#ifndef CUDA_HOST_CUDA_RUNTIME_H_
#define CUDA_HOST_CUDA_RUNTIME_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Shared variables lie in one section, so that they can be filled with garbage when a block starts and put aside when
// another goes on. GCC leaves those of templates and of functions with external linkage out. Address sanitizer guards
// none in a section.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static __attribute__((section("cuda_shared")))
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace cuda_host {

enum class Collective { kSync, kShuffle, kShuffleXor, kBallot, kAdd };

// What every lane of the mask brings and gets; returns when all of them have come.
uint64_t warp_collective(Collective what, unsigned mask, uint64_t value, int argument);
// The number of threads of the block that came with true.
int block_barrier(bool value);

// False where the grid cannot end: cuda_host_failure says why.
bool run_grid(dim3 grid, dim3 block, bool behind, const std::function<void()>& body);

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_host

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using std::isfinite;
using std::min;

inline void __syncthreads() { cuda_host::block_barrier(false); }
inline int __syncthreads_count(int value) { return cuda_host::block_barrier(value != 0); }
inline int __syncthreads_or(int value) { return cuda_host::block_barrier(value != 0) > 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_host::warp_collective(cuda_host::Collective::kSync, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
  return static_cast<unsigned>(
      cuda_host::warp_collective(cuda_host::Collective::kBallot, mask, value != 0, 0));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(cuda_host::warp_collective(cuda_host::Collective::kAdd, mask, value, 0));
}
inline float __shfl_sync(unsigned mask, float value, int lane) {
  const auto bits = cuda_host::bits_as<uint32_t>(value);
  return cuda_host::bits_as<float>(static_cast<uint32_t>(
      cuda_host::warp_collective(cuda_host::Collective::kShuffle, mask, bits, lane)));
}
inline float __shfl_xor_sync(unsigned mask, float value, int lanes) {
  const auto bits = cuda_host::bits_as<uint32_t>(value);
  return cuda_host::bits_as<float>(static_cast<uint32_t>(
      cuda_host::warp_collective(cuda_host::Collective::kShuffleXor, mask, bits, lanes)));
}

inline void __threadfence() {}
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicExch(T* at, T value) {
  const T before = *at;
  *at = value;
  return before;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __expf(float x) { return std::exp(x); }
inline float __int_as_float(int bits) { return cuda_host::bits_as<float>(bits); }
inline double __longlong_as_double(long long bits) { return cuda_host::bits_as<double>(bits); }
inline double __ll2double_rn(long long value) { return static_cast<double>(value); }
// The build has no contraction, so that each of these is rounded by itself.
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

// The runtime's functions, as far as csrc/ calls them. ---------------------------------------------------------------

#define CUDART_VERSION 13000

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
typedef struct CUstream_st* cudaStream_t;
#define cudaStreamLegacy (reinterpret_cast<cudaStream_t>(0x1))

enum cudaMemoryType {
  cudaMemoryTypeUnregistered = 0,
  cudaMemoryTypeHost = 1,
  cudaMemoryTypeDevice = 2,
  cudaMemoryTypeManaged = 3
};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;

cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* found);

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  const Params copy = params;  // as a launch does: the caller's struct may change at once
  const bool ran = cuda_host::run_grid(config->gridDim, config->blockDim, config->numAttrs > 0, [&] { kernel(copy); });
  return ran ? cudaSuccess : cudaErrorLaunchFailure;
}

#endif  // CUDA_HOST_CUDA_RUNTIME_H_
