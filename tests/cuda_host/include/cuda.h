// The driver's types, as far as csrc/ names them.
#ifndef CUDA_HOST_CUDA_H_
#define CUDA_HOST_CUDA_H_

#include <cstddef>

#define CUDAAPI

typedef unsigned long long CUdeviceptr;
typedef struct CUstream_st* CUstream;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUmemcpySrcAccessOrder { CU_MEMCPY_SRC_ACCESS_ORDER_INVALID = 0, CU_MEMCPY_SRC_ACCESS_ORDER_STREAM = 1 };
struct CUmemcpyAttributes {
  CUmemcpySrcAccessOrder srcAccessOrder;
};

#endif  // CUDA_HOST_CUDA_H_
