#ifndef CUDA_HOST_CUDA_FP16_H_
#define CUDA_HOST_CUDA_FP16_H_

#include "cpu/element.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return atts::host::Float16::widen(value.bits); }
inline __half __float2half_rn(float value) { return {atts::host::Float16::narrow(value)}; }

#endif  // CUDA_HOST_CUDA_FP16_H_
