// The packed form of a bfloat16 matrix, as atts.h describes it, and what reads it.
#ifndef ATTS_CPU_PACKED_H_
#define ATTS_CPU_PACKED_H_

#include <cstddef>
#include <cstdint>

namespace atts {

constexpr int64_t kPackedColumns = 32;  // rows of the matrix in a block: columns of a product
constexpr int64_t kPackedWords = 32;    // words of two elements of each of them
constexpr int64_t kPackedBlock = kPackedColumns * kPackedWords * 3;  // bytes of a block's data
constexpr int64_t kRawBlock = kPackedColumns * kPackedWords * 4;     // and where it has more than sixteen exponents
constexpr int kExponents = 16;

struct PackedIndex {
  uint8_t exponent[kExponents];
  uint64_t at;   // of the block's data, bytes from the matrix's begin
  uint64_t raw;  // 1: words as they are
};

struct PackedMatrix {
  uint64_t magic;
  int64_t out_features, in_features;
  uint64_t reserved[5];

  const PackedIndex* block(int64_t column, int64_t blocks_of_a_row) const {
    return reinterpret_cast<const PackedIndex*>(this + 1) + column / kPackedColumns * blocks_of_a_row;
  }
  const uint8_t* data(const PackedIndex& block) const { return reinterpret_cast<const uint8_t*>(this) + block.at; }
};
static_assert(sizeof(PackedMatrix) == 64 && sizeof(PackedIndex) == 32, "as atts.h has them");

constexpr uint64_t kPackedMagic = 0x3132314650535441;  // "ATSPF121"

inline bool packs(int64_t out_features, int64_t in_features) {
  return out_features % kPackedColumns == 0 && in_features % (2 * kPackedWords) == 0;
}

// Of an array that is not NULL and aligned.
inline bool is_packed(const void* packed, int64_t out_features, int64_t in_features) {
  const auto* matrix = static_cast<const PackedMatrix*>(packed);
  return packs(out_features, in_features) && matrix->magic == kPackedMagic && matrix->out_features == out_features &&
         matrix->in_features == in_features;
}

// Rows first .. first + 31 of the matrix, first a multiple of 32, as they were: out[32, in_features].
void unpack_columns(const PackedMatrix& packed, int64_t first, uint16_t* out);

}  // namespace atts

#endif  // ATTS_CPU_PACKED_H_
