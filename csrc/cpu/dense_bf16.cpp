// Dense layers by the processor's own products of bfloat16.
#include <algorithm>
#include <cstring>

#include "cpu/bf16.h"
#include "cpu/kernels.h"
#include "cpu/table.h"

namespace atts {
namespace ATTS_ISA {

// Words of two elements, the odd one at the end filled up with zero.
void prepare(const uint16_t* x, int64_t rows, int64_t n, float* out) {
  for (int64_t row = 0; row < rows; ++row) {
    out[row * n + (n - 1) / 2] = 0.0f;
    std::memcpy(out + row * n, x + row * n, static_cast<size_t>(n) * sizeof *x);
  }
}

namespace {

constexpr int64_t kWords = 384;  // of a block: 48 KiB for two groups of columns

// next: columns that follow these and will be asked for next.
template <int C>
void dot_columns(const uint32_t* x, int64_t rows, const uint16_t* weight, int64_t columns, int64_t next, int64_t n,
                 float* out, int64_t out_stride) {
  alignas(64) uint32_t block[kWords * C * kLanes];
  const int64_t all = (n + 1) / 2, tiles = (rows + kTileRows - 1) / kTileRows;
  const char* const behind = reinterpret_cast<const char*>(weight + columns * n);
  Ahead ahead{behind, behind + 2 * next * n, (next * n / 32 + all * tiles - 1) / (all * tiles)};
  const __mmask16 last = static_cast<__mmask16>((1u << (columns - (C - 1) * kLanes)) - 1);
  for (int64_t first = 0; first < all; first += kWords) {
    const int64_t words = std::min(all - first, kWords);
    for (int64_t c = 0; c < C; ++c) {
      const uint16_t* column[kLanes];  // those beyond the last repeat it
      for (int64_t i = 0; i < kLanes; ++i) column[i] = weight + std::min(c * kLanes + i, columns - 1) * n;
      transpose_columns(column, n, 2 * first, words, block + c * kLanes, C * kLanes);
    }
    // As even as can be: a tile of one row at the end would take as long as one of four.
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * rows / tiles, end = (t + 1) * rows / tiles;
      kTiles<C>[end - row - 1](x + row * n + first, n, block, words, first == 0, last, out + row * out_stride,
                               out_stride, ahead);
    }
  }
}

}  // namespace

void dot(const float* x, int64_t rows, const uint16_t* weight, int64_t columns, int64_t n, float* out,
         int64_t out_stride) {
  const auto* words = reinterpret_cast<const uint32_t*>(x);
  for (int64_t column = 0; column < columns;) {
    const int64_t left = columns - column, here = std::min(left, 2 * kLanes), next = std::min(left - here, 2 * kLanes);
    (here > kLanes ? dot_columns<2> : dot_columns<1>)(words, rows, weight + column * n, here, next, n, out + column,
                                                      out_stride);
    column += here;
  }
}

}  // namespace ATTS_ISA
}  // namespace atts
