// What the kernels share. tests/cuda_host/ compiles the same files for the host.
#ifndef ATTS_CUDA_DEVICE_CUH_
#define ATTS_CUDA_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "atts/atts.h"

namespace atts {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;

// Of several rows that are wrong in different ways, any one's status stays.
__device__ __forceinline__ void report(int32_t* error, int32_t status) {
  if (error != nullptr) atomicExch(error, status);
}

// Lets the kernel behind be placed, where it was launched so; it still waits for this one's end.
__device__ __forceinline__ void let_kernel_behind_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Nothing that the kernel ahead writes may be read before this.
__device__ __forceinline__ void wait_for_kernel_ahead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Float32 {
  using type = float;
  static __device__ __forceinline__ float widen(float value) { return value; }
  static __device__ __forceinline__ float narrow(float value) { return value; }
};

struct Float16 {
  using type = __half;
  static __device__ __forceinline__ float widen(__half value) { return __half2float(value); }
  static __device__ __forceinline__ __half narrow(float value) { return __float2half_rn(value); }
};

struct Bfloat16 {
  using type = __nv_bfloat16;
  static __device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
};

// n elements side by side: one 16-byte access where they fill it, which needs that alignment, else one by one.
template <class T, int n>
struct Pack {
  T at[n];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (n * sizeof(T) == kVectorBytes) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from);
      memcpy(at, &raw, sizeof raw);
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) at[i] = from[i];
    }
  }

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (n * sizeof(T) == kVectorBytes) {
      uint4 raw;
      memcpy(&raw, at, sizeof raw);
      *reinterpret_cast<uint4*>(to) = raw;
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) to[i] = at[i];
    }
  }
};

}  // namespace atts

#endif  // ATTS_CUDA_DEVICE_CUH_
