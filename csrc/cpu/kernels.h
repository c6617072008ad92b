// The inner loops of the host's ops. They are compiled once for each instruction set; `kernels` picks what this processor
// runs. An element is a float, or a bfloat16 as its 16 bits.
#ifndef ATTS_CPU_KERNELS_H_
#define ATTS_CPU_KERNELS_H_

#include <type_traits>

#include "atts/atts.h"
#include "cpu/packed.h"

namespace atts {

constexpr int64_t kScoreBlock = 512;    // logits of one normaliser's block
constexpr int64_t kAttentionRows = 16;  // query rows of one unit of attention

// An element's bits, and an integer that orders them.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
template <class T>
using OrderOf = std::make_signed_t<BitsOf<T>>;

// Loops over elements of one type; arrays in params are of it.
template <class T>
struct ElementKernels {
  // out[r * out_stride + c] = x[r] . weight[c], row r of x at x + r * n, prepared (`Kernels::prepare`) where T is bfloat16.
  void (*dot)(const float* x, int64_t rows, const T* weight, int64_t columns, int64_t n, float* out,
              int64_t out_stride);
  // out[n] = sum[n] + bias[n], rounded once.
  void (*narrow)(const float* sum, const T* bias, int64_t n, T* out);
  // Floats of scratch that `attend` takes for keys 0 .. longest-1.
  int64_t (*attention_scratch)(const atts_attention_params& p, int64_t longest);
  // Query rows first .. last-1 of sequence b for the query heads that share KV heads h_first .. h_last-1.
  void (*attend)(const atts_attention_params& p, int64_t b, int64_t h_first, int64_t h_last, int64_t first,
                 int64_t last, float* scratch);
  void (*rms_norm)(const atts_rms_norm_params& p, int64_t first, int64_t last);
  void (*silu_mul)(const atts_silu_mul_params& p, int64_t first, int64_t last);
  void (*rope)(const atts_rope_params& p, int64_t first, int64_t last);
  // The largest of x[n] as an integer that orders as values do, with -0 below 0, and the largest of its bits less the sign.
  void (*extremes)(const T* x, int64_t n, OrderOf<T>* highest, BitsOf<T>* size);
  // The first i with x[i] of these bits, n where there is none.
  int64_t (*find)(const T* x, int64_t n, BitsOf<T> a, BitsOf<T> b);
  // The first of first, first + 8, ... from which on eight tokens hold one whose noise may let it win (`which`, a bit each),
  // n where there is none; slope, shift and stream as `draw` has them.
  int64_t (*contenders)(const T* logits, int64_t first, int64_t n, float slope, float shift, uint64_t stream,
                        uint32_t* which);
};

struct Kernels {
  const char* isa;
  ElementKernels<uint16_t> bf16;
  ElementKernels<float> fp32;
  // Bfloat16 x[rows, n] in the form in which `dot` reads it; row r begins at out + r * n.
  void (*prepare)(const uint16_t* x, int64_t rows, int64_t n, float* out);
  // `dot` for columns first .. of a packed matrix, with the same bits; both are multiples of 32. NULL: there is none.
  void (*dot_packed)(const float* x, int64_t rows, const PackedMatrix& weight, int64_t first, int64_t columns,
                     float* out, int64_t out_stride);
  // x[n] as fp32, in order.
  void (*widen)(const uint16_t* x, int64_t n, float* out);
  // The largest of values[n] and the sum of exp(value - largest); values[n .. n rounded up to 8) are overwritten.
  void (*softmax_parts)(float* values, int64_t n, float* largest, float* sum);

  template <class T>
  const ElementKernels<T>& of() const {
    if constexpr (std::is_same_v<T, float>)
      return fp32;
    else
      return bf16;
  }
};

const Kernels& kernels();

}  // namespace atts

#endif  // ATTS_CPU_KERNELS_H_
