// Dense layers by the processor's own products of bfloat16.
#include <algorithm>
#include <cstring>
#include <iterator>

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
constexpr int64_t kAhead = 192;  // elements of a column between what is read and what is fetched

// Few rows use a column too little for a block to pay: each word is multiplied as it comes out of the transposition, and
// what bounds the loop is memory, which is asked a few lines ahead of itself. next: as below.
template <int R>
void dot_few(const uint32_t* x, const uint16_t* weight, int64_t columns, int64_t next, int64_t n, float* out,
             int64_t out_stride) {
  const int64_t all = (n + 1) / 2;
  const int64_t wraps = std::min(next, kLanes) * n - n;  // from behind a column's end to the column that follows it
  const uint16_t* column[kLanes];                        // those beyond the last repeat it
  for (int64_t i = 0; i < kLanes; ++i) column[i] = weight + std::min(i, columns - 1) * n;
  __m512 sum[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_ps();
  for (int64_t w = 0; w < all; w += kLanes) {
    __m512i read[kLanes];
    read_columns(column, n, 2 * w, read);
    const int64_t then = 2 * w + std::min(kAhead, n), ahead = then < n ? then : then + wraps;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) _mm_prefetch(column[i] + ahead, _MM_HINT_T0);
    transpose(read, [&](int64_t i, __m512i word) {
      if (w + i >= all) return;
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i own = _mm512_set1_epi32(static_cast<int>(x[r * n + w + i]));
        sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)word, (__m512bh)own);
      }
    });
  }
  const __mmask16 live = static_cast<__mmask16>((1u << columns) - 1);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) _mm512_mask_storeu_ps(out + r * out_stride, live, sum[r]);
}

using DotFew = void (*)(const uint32_t*, const uint16_t*, int64_t, int64_t, int64_t, float*, int64_t);
constexpr DotFew kDotFew[] = {dot_few<1>, dot_few<2>, dot_few<3>, dot_few<4>,  dot_few<5>,  dot_few<6>,
                              dot_few<7>, dot_few<8>, dot_few<9>, dot_few<10>, dot_few<11>, dot_few<12>};
constexpr int64_t kFewRows = std::size(kDotFew);

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

void dot_bf16(const float* x, int64_t rows, const uint16_t* weight, int64_t columns, int64_t n, float* out,
         int64_t out_stride) {
  const auto* words = reinterpret_cast<const uint32_t*>(x);
  const int64_t most = (rows <= kFewRows ? 1 : 2) * kLanes;
  for (int64_t column = 0, here; column < columns; column += here) {
    here = std::min(columns - column, most);
    const int64_t next = std::min(columns - column - here, most);
    const uint16_t* const first = weight + column * n;
    if (rows <= kFewRows)
      kDotFew[rows - 1](words, first, here, next, n, out + column, out_stride);
    else
      (here > kLanes ? dot_columns<2> : dot_columns<1>)(words, rows, first, here, next, n, out + column, out_stride);
  }
}

namespace {

// Two words of 32 columns at a time, as they were: take(word of the block, half of the columns, their words).
template <class Take>
ATTS_INLINE void unpack(const PackedIndex& block, const uint8_t* from, Take take) {
  if (block.raw) {
    for (int64_t w = 0; w < kPackedWords; ++w, from += 128) {
      take(w, 0, _mm512_loadu_si512(from));
      take(w, 1, _mm512_loadu_si512(from + 64));
    }
    return;
  }
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80)), nibble = _mm512_set1_epi8(15);
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block.exponent)));
  // The upper byte of a bfloat16 is its sign and seven bits of the exponent, the lower one the eighth and the mantissa.
  const __m512i upper = _mm512_andnot_si512(sign, _mm512_srli_epi16(table, 1)),
                lower = _mm512_and_si512(sign, _mm512_slli_epi16(table, 7));
  for (int64_t w = 0; w < kPackedWords; w += 2, from += 192) {
#pragma GCC unroll 3
    for (int line = 0; line < 3; ++line) _mm_prefetch(from + kPackedBlock + 64 * line, _MM_HINT_T0);
    const __m512i both = _mm512_loadu_si512(from);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i place = _mm512_and_si512(odd ? _mm512_srli_epi16(both, 4) : both, nibble);
      const __m512i rest = _mm512_loadu_si512(from + 64 + 64 * odd);
      const __m512i high = _mm512_ternarylogic_epi64(_mm512_shuffle_epi8(upper, place), rest, sign, 0xf8),  // a | b & c
                    low = _mm512_ternarylogic_epi64(_mm512_shuffle_epi8(lower, place), rest, sign, 0xf4);  // a | b & ~c
      take(w + odd, 0, _mm512_unpacklo_epi8(low, high));
      take(w + odd, 1, _mm512_unpackhi_epi8(low, high));
    }
  }
}

// 32 columns of a packed matrix, whose first block is given.
template <int R>
void dot_few_packed(const uint32_t* x, const PackedMatrix& weight, const PackedIndex* block, float* out,
                    int64_t out_stride) {
  const int64_t n = weight.in_features;
  __m512 sum[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t first = 0; first < n / 2; first += kPackedWords, ++block)
    unpack(*block, weight.data(*block), [&](int64_t w, int half, __m512i word) {
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i own = _mm512_set1_epi32(static_cast<int>(x[r * n + first + w]));
        sum[r][half] = _mm512_dpbf16_ps(sum[r][half], (__m512bh)word, (__m512bh)own);
      }
    });
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(out + r * out_stride + half * kLanes, sum[r][half]);
}

using DotFewPacked = void (*)(const uint32_t*, const PackedMatrix&, const PackedIndex*, float*, int64_t);
constexpr DotFewPacked kDotFewPacked[kFewRows] = {
    dot_few_packed<1>, dot_few_packed<2>, dot_few_packed<3>, dot_few_packed<4>,  dot_few_packed<5>,  dot_few_packed<6>,
    dot_few_packed<7>, dot_few_packed<8>, dot_few_packed<9>, dot_few_packed<10>, dot_few_packed<11>, dot_few_packed<12>};

// The same for many rows: decoded once into a block that all of them use, as dot_columns does with what it transposes.
// next: columns that follow these and will be asked for next, as many or none.
void dot_block_packed(const uint32_t* x, int64_t rows, const PackedMatrix& weight, const PackedIndex* index, int64_t next,
                      float* out, int64_t out_stride) {
  alignas(64) uint32_t block[kWords * 2 * kLanes];
  const int64_t n = weight.in_features, all = n / 2, tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t bytes = next > 0 ? n / (2 * kPackedWords) * kPackedBlock : 0;
  const auto* const behind = reinterpret_cast<const char*>(weight.data(*index)) + bytes;
  Ahead ahead{behind, behind + bytes, (bytes / 64 + all * tiles - 1) / (all * tiles)};
  for (int64_t first = 0; first < all; first += kWords) {
    const int64_t words = std::min(all - first, kWords);
    for (int64_t at = 0; at < words; at += kPackedWords, ++index)
      unpack(*index, weight.data(*index), [&](int64_t w, int half, __m512i word) {
        _mm512_store_si512(block + ((at + w) * 2 + half) * kLanes, word);
      });
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * rows / tiles, end = (t + 1) * rows / tiles;
      kTiles<2>[end - row - 1](x + row * n + first, n, block, words, first == 0, 0xffff, out + row * out_stride,
                               out_stride, ahead);
    }
  }
}

}  // namespace

void dot_packed(const float* x, int64_t rows, const PackedMatrix& weight, int64_t first, int64_t columns, float* out,
                int64_t out_stride) {
  const auto* words = reinterpret_cast<const uint32_t*>(x);
  for (int64_t column = 0; column < columns; column += kPackedColumns) {
    const PackedIndex* const block = weight.block(first + column, weight.in_features / (2 * kPackedWords));
    if (rows <= kFewRows)
      kDotFewPacked[rows - 1](words, weight, block, out + column, out_stride);
    else
      dot_block_packed(words, rows, weight, block, columns - column - kPackedColumns, out + column, out_stride);
  }
}

}  // namespace ATTS_ISA
}  // namespace atts
