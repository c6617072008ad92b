// Dot products of rows with rows of weights, which are read once as they are, summed in fp32.
//
// An output's bits depend on its own two rows alone: every dot product runs over the same partial sums in index order,
// whichever rows and columns share its tile, so tiles, batches and threads cannot move a bit.
#include "cpu/fp32.h"
#include "cpu/kernels.h"
#include "cpu/table.h"

namespace atts {
namespace ATTS_ISA {
namespace {

constexpr int64_t kRowBytes = 24 << 10;

template <class T, int R, int C>
void tile(const float* x, const T* weight, int64_t n, float* out, int64_t out_stride) {
  const T* columns[C];
  for (int c = 0; c < C; ++c) columns[c] = weight + c * n;
  dot_tile<T, R, C>(x, n, columns, n, out, out_stride);
}

template <class T>
using Tile = void (*)(const float*, const T*, int64_t, float*, int64_t);
template <class T>
constexpr Tile<T> kTiles[] = {tile<T, 1, 4>, tile<T, 2, 4>, tile<T, 3, 4>, tile<T, 4, 4>, tile<T, 5, 4>, tile<T, 6, 4>};

template <class T>
void dot(const float* x, int64_t rows, const T* weight, int64_t columns, int64_t n, float* out, int64_t out_stride) {
  const int64_t whole = columns / 4 * 4;
  int64_t column = 0;
  if (rows == 1)  // eight sums keep the multipliers busy where 4 x 1 would wait for each other
    for (; column + 8 <= columns; column += 8) tile<T, 1, 8>(x, weight + column * n, n, out + column, out_stride);
  const int64_t fours = column;
  // Rows that stay in the first-level cache beside four columns of weights; tiles as even as can be, since one of a single
  // row at the end would wait for its own sums.
  const int64_t fit = kRowBytes / (4 * n), block = fit < kTileRows<T> ? kTileRows<T> : fit;
  for (int64_t first = 0, last; first < rows; first = last) {
    last = rows - first < 2 * block ? rows : first + block;
    const int64_t here = last - first, tiles = (here + kTileRows<T> - 1) / kTileRows<T>;
    for (column = fours; column < whole; column += 4)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = first + t * here / tiles, end = first + (t + 1) * here / tiles;
        kTiles<T>[end - row - 1](x + row * n, weight + column * n, n, out + row * out_stride + column, out_stride);
      }
  }
  for (column = whole; column < columns; ++column)
    for (int64_t row = 0; row < rows; ++row)
      tile<T, 1, 1>(x + row * n, weight + column * n, n, out + row * out_stride + column, out_stride);
}

}  // namespace

void dot_fp32(const float* x, int64_t rows, const float* weight, int64_t columns, int64_t n, float* out,
              int64_t out_stride) {
  dot(x, rows, weight, columns, n, out, out_stride);
}

#if !defined(ATTS_BF16_PRODUCTS)
void prepare(const uint16_t* x, int64_t rows, int64_t n, float* out) {
  for (int64_t row = 0; row < rows; ++row) widen_row(x + row * n, n, 1.0f, out + row * n);
}

void dot_bf16(const float* x, int64_t rows, const uint16_t* weight, int64_t columns, int64_t n, float* out,
              int64_t out_stride) {
  dot(x, rows, weight, columns, n, out, out_stride);
}
#endif

}  // namespace ATTS_ISA
}  // namespace atts
