// Dot products of widened rows with rows of 16-bit weights, read once as they are and summed in fp32.
//
// An output's bits depend on its own two rows alone: every dot product runs over eight partial sums in index order,
// whichever rows and columns share its tile, so tiles, batches and threads cannot move a bit.
#include "cpu/fp32.h"

#include "cpu/kernels.h"
#include "cpu/table.h"

namespace atts {
namespace ATTS_ISA {

void prepare(const uint16_t* x, int64_t rows, int64_t n, float* out) {
  for (int64_t row = 0; row < rows; ++row) widen_row(x + row * n, n, 1.0f, out + row * n);
}

namespace {

constexpr int64_t kRowBytes = 24 << 10;

template <int R, int C>
ATTS_INLINE void tile(const float* x, const uint16_t* weight, int64_t n, float* out, int64_t out_stride) {
  const uint16_t* columns[C];
  for (int c = 0; c < C; ++c) columns[c] = weight + c * n;
  dot_tile<R, C>(x, n, columns, n, out, out_stride);
}

}  // namespace

void dot(const float* x, int64_t rows, const uint16_t* weight, int64_t columns, int64_t n, float* out,
         int64_t out_stride) {
  // Rows that stay in the first-level cache beside four columns of weights, in whole tiles.
  const int64_t fit = kRowBytes / (4 * n) / 3 * 3, block = fit < 3 ? 3 : fit;
  const int64_t whole = columns / 4 * 4;
  int64_t column = 0;
  if (rows == 1)  // eight sums keep the multipliers busy where 4 x 1 would wait for each other
    for (; column + 8 <= columns; column += 8) tile<1, 8>(x, weight + column * n, n, out + column, out_stride);
  const int64_t fours = column;
  for (int64_t first = 0, last; first < rows; first = last) {
    last = rows - first <= block + 1 ? rows : first + block;  // no row is left alone
    for (column = fours; column < whole; column += 4) {
      const uint16_t* w = weight + column * n;
      float* o = out + column;
      int64_t row = first;
      for (; last - row >= 3 && last - row != 4; row += 3)
        tile<3, 4>(x + row * n, w, n, o + row * out_stride, out_stride);
      for (; last - row >= 2; row += 2) tile<2, 4>(x + row * n, w, n, o + row * out_stride, out_stride);
      if (row < last) tile<1, 4>(x + row * n, w, n, o + row * out_stride, out_stride);
    }
  }
  for (column = whole; column < columns; ++column)
    for (int64_t row = 0; row < rows; ++row)
      tile<1, 1>(x + row * n, weight + column * n, n, out + row * out_stride + column, out_stride);
}

}  // namespace ATTS_ISA
}  // namespace atts
