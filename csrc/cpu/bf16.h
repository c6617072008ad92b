// The tile that dense layers, scores and attention share where the processor multiplies bfloat16 itself: pairs are
// multiplied and added to an fp32 sum, subnormal numbers count as zero.
//
// A register holds one sum of each of sixteen columns, so columns are wanted side by side and lie apart: sixteen at a time
// are transposed, as words of two elements, into a block that all rows of the input then use. Every sum runs over the words
// in index order, so tiles, batches and threads cannot move a bit.
#ifndef ATTS_CPU_BF16_H_
#define ATTS_CPU_BF16_H_

#include <immintrin.h>

#include <algorithm>

#include "cpu/vector.h"

namespace atts {
namespace {

constexpr int64_t kLanes = 16;
constexpr int kTileRows = 12;  // 12 x 2 sums, two columns' words and one of the input fill the registers

// take(w, words): word w of sixteen rows side by side, for w = 0 .. 15 in order.
template <class Take>
ATTS_INLINE void transpose(const __m512i* rows, Take take) {
  __m512i quarter[4][4];  // [i][j]: quarter i of rows j, 4 + j, 8 + j and 12 + j
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x44),
                  low23 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x44),
                  high01 = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xee),
                  high23 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xee);
    quarter[0][j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    quarter[1][j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    quarter[2][j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    quarter[3][j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i* q = quarter[i];
    const __m512i even01 = _mm512_unpacklo_epi32(q[0], q[1]), odd01 = _mm512_unpackhi_epi32(q[0], q[1]),
                  even23 = _mm512_unpacklo_epi32(q[2], q[3]), odd23 = _mm512_unpackhi_epi32(q[2], q[3]);
    take(4 * i, _mm512_unpacklo_epi64(even01, even23));
    take(4 * i + 1, _mm512_unpackhi_epi64(even01, even23));
    take(4 * i + 2, _mm512_unpacklo_epi64(odd01, odd23));
    take(4 * i + 3, _mm512_unpackhi_epi64(odd01, odd23));
  }
}

// Elements at .. at + 31 of sixteen columns of n elements, 0 behind the last.
ATTS_INLINE void read_columns(const uint16_t* const* column, int64_t n, int64_t at, __m512i* read) {
  const int64_t left = n - at;
  if (left >= 2 * kLanes) {
#pragma GCC unroll 16
    for (int64_t c = 0; c < kLanes; ++c) read[c] = _mm512_loadu_si512(column[c] + at);
  } else {
    const __mmask32 live = static_cast<__mmask32>((uint64_t{1} << left) - 1);
#pragma GCC unroll 16
    for (int64_t c = 0; c < kLanes; ++c) read[c] = _mm512_maskz_loadu_epi16(live, column[c] + at);
  }
}

// Elements first .. first + 2 * words of sixteen columns of n elements, transposed; to[w * stride + c].
ATTS_INLINE void transpose_columns(const uint16_t* const* column, int64_t n, int64_t first, int64_t words, uint32_t* to,
                                   int64_t stride) {
  for (int64_t w = 0; w < words; w += kLanes) {
    __m512i read[kLanes];
    read_columns(column, n, first + 2 * w, read);
    transpose(read, [&](int i, __m512i word) {
      if (w + i < words) _mm512_store_si512(to + (w + i) * stride, word);
    });
  }
}

// Memory that the next block will be read from: fetched while this one is multiplied, `lines` a word.
struct Ahead {
  const char* at;
  const char* end;
  int64_t lines;

  void fetch() {
    for (int64_t i = 0; i < lines && at < end; ++i, at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

// out[r * out_stride + 16 c + lane] += over `words` words of x[r] and of the transposed columns; 0 before the first.
template <int R, int C>
void tile(const uint32_t* x, int64_t x_stride, const uint32_t* weight, int64_t words, bool begins, __mmask16 last,
          float* out, int64_t out_stride, Ahead& ahead) {
  __m512 sum[R][C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c)
      sum[r][c] = begins ? _mm512_setzero_ps()
                         : _mm512_maskz_loadu_ps(c == C - 1 ? last : 0xffff, out + r * out_stride + c * kLanes);
  for (int64_t w = 0; w < words; ++w) {
    ahead.fetch();
    __m512bh column[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) column[c] = (__m512bh)_mm512_load_si512(weight + w * C * kLanes + c * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512bh word = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r * x_stride + w]));
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], word, column[c]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c)
      _mm512_mask_storeu_ps(out + r * out_stride + c * kLanes, c == C - 1 ? last : 0xffff, sum[r][c]);
}

using Tile = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, bool, __mmask16, float*, int64_t,
                      Ahead&);
template <int C>
constexpr Tile kTiles[kTileRows] = {tile<1, C>, tile<2, C>, tile<3, C>, tile<4, C>,  tile<5, C>,  tile<6, C>,
                                    tile<7, C>, tile<8, C>, tile<9, C>, tile<10, C>, tile<11, C>, tile<12, C>};

}  // namespace
}  // namespace atts

#endif  // ATTS_CPU_BF16_H_
