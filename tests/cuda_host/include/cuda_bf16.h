#ifndef CUDA_HOST_CUDA_BF16_H_
#define CUDA_HOST_CUDA_BF16_H_

#include "cpu/element.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) { return atts::host::Bfloat16::widen(value.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {atts::host::Bfloat16::narrow(value)}; }

#endif  // CUDA_HOST_CUDA_BF16_H_
