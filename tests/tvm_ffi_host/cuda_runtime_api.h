// What csrc/tvm_ffi.cpp takes from the CUDA runtime, on a machine that has one device, the CPU.
#pragma once

enum cudaError_t { cudaSuccess = 0 };

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
