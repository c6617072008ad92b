// bfloat16 matrices in three quarters of their bytes, and back.
#include "cpu/packed.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "atts/atts.h"
#include "checks.h"
#include "cpu/parallel.h"

namespace atts {
namespace {

constexpr int kNone = 255;  // not a place in the table

// Places of a block's exponents, in order of appearance; false where there are more than a table has.
bool tabulate(const uint16_t* weight, int64_t n, uint8_t* exponent, uint8_t* place) {
  std::memset(place, kNone, 256);
  int used = 0;
  for (int64_t c = 0; c < kPackedColumns; ++c)
    for (int64_t i = 0; i < 2 * kPackedWords; ++i) {
      const int own = weight[c * n + i] >> 7 & 255;
      if (place[own] != kNone) continue;
      if (used == kExponents) return false;
      place[own] = static_cast<uint8_t>(used);
      exponent[used++] = static_cast<uint8_t>(own);
    }
  return true;
}

// Where the bytes of an element lie among the 64 of its word: columns 4 i .. 4 i + 3 of either half share sixteen.
int64_t place_of(int64_t column, int64_t odd) {
  return column % 16 / 4 * 16 + column / 16 * 8 + column % 4 * 2 + odd;
}

void pack_block(const uint16_t* weight, int64_t n, const uint8_t* place, uint8_t* to) {
  for (int64_t w = 0; w < kPackedWords; ++w) {
    uint8_t* const nibbles = to + w / 2 * 192;
    uint8_t* const rest = nibbles + 64 + w % 2 * 64;
    for (int64_t c = 0; c < kPackedColumns; ++c)
      for (int64_t odd = 0; odd < 2; ++odd) {
        const uint16_t value = weight[c * n + 2 * w + odd];
        const int64_t at = place_of(c, odd);
        const int nibble = place[value >> 7 & 255];
        nibbles[at] = static_cast<uint8_t>(w % 2 ? nibbles[at] | nibble << 4 : nibble);
        rest[at] = static_cast<uint8_t>((value >> 8 & 0x80) | (value & 0x7f));
      }
  }
}

void unpack_block(const PackedIndex& block, const uint8_t* from, int64_t n, uint16_t* weight) {
  for (int64_t w = 0; w < kPackedWords; ++w)
    for (int64_t c = 0; c < kPackedColumns; ++c)
      for (int64_t odd = 0; odd < 2; ++odd) {
        uint16_t& value = weight[c * n + 2 * w + odd];
        if (block.raw) {
          std::memcpy(&value, from + ((w * kPackedColumns + c) * 2 + odd) * 2, sizeof value);
          continue;
        }
        const int64_t at = place_of(c, odd);
        const uint8_t rest = from[w / 2 * 192 + 64 + w % 2 * 64 + at];
        const int exponent = block.exponent[from[w / 2 * 192 + at] >> (w % 2 ? 4 : 0) & 15];
        value = static_cast<uint16_t>((rest & 0x80) << 8 | exponent << 7 | (rest & 0x7f));
      }
}

struct Plan {
  std::vector<PackedIndex> blocks;
  uint64_t bytes;
};

Plan plan(const atts_pack_weight_params& p) {
  const int64_t across = p.in_features / (2 * kPackedWords), groups = p.out_features / kPackedColumns;
  Plan made{std::vector<PackedIndex>(static_cast<size_t>(groups * across)), 0};
  parallel(groups, p.threads, [&](int64_t group) {
    uint8_t place[256];
    for (int64_t b = 0; b < across; ++b) {
      const uint16_t* from = p.weight + group * kPackedColumns * p.in_features + b * 2 * kPackedWords;
      PackedIndex& block = made.blocks[static_cast<size_t>(group * across + b)];
      block.raw = !tabulate(from, p.in_features, block.exponent, place);
      if (block.raw) std::memset(block.exponent, 0, sizeof block.exponent);
    }
  });
  made.bytes = sizeof(PackedMatrix) + (made.blocks.size() * sizeof(PackedIndex) + 63) / 64 * 64;
  for (PackedIndex& block : made.blocks) {
    block.at = made.bytes;
    made.bytes += block.raw ? kRawBlock : kPackedBlock;
  }
  return made;
}

void pack(const atts_pack_weight_params& p, const Plan& plan) {
  const int64_t across = p.in_features / (2 * kPackedWords), groups = p.out_features / kPackedColumns;
  auto* const to = static_cast<uint8_t*>(p.packed);
  const PackedMatrix matrix{kPackedMagic, p.out_features, p.in_features, {}};
  std::memcpy(to, &matrix, sizeof matrix);
  std::memcpy(to + sizeof matrix, plan.blocks.data(), plan.blocks.size() * sizeof(PackedIndex));
  parallel(groups, p.threads, [&](int64_t group) {
    for (int64_t b = 0; b < across; ++b) {
      const uint16_t* from = p.weight + group * kPackedColumns * p.in_features + b * 2 * kPackedWords;
      const PackedIndex& block = plan.blocks[static_cast<size_t>(group * across + b)];
      if (block.raw) {
        auto* word = reinterpret_cast<uint32_t*>(to + block.at);
        for (int64_t w = 0; w < kPackedWords; ++w)
          for (int64_t c = 0; c < kPackedColumns; ++c)
            std::memcpy(word++, from + c * p.in_features + 2 * w, sizeof *word);
        continue;
      }
      uint8_t place[256];
      for (int i = kExponents; i-- > 0;) place[block.exponent[i]] = static_cast<uint8_t>(i);
      pack_block(from, p.in_features, place, to + block.at);
    }
  });
}

atts_status check(const atts_pack_weight_params* params) {
  if (const atts_status status = check_struct(params)) return status;
  const atts_pack_weight_params& p = *params;
  if (p.out_features < 1 || p.in_features < 1 || p.threads < 1 || product(p.out_features, p.in_features, 2) < 0 ||
      !packs(p.out_features, p.in_features))
    return ATTS_ERROR_SHAPE;
  if (p.weight == nullptr) return ATTS_ERROR_NULL_POINTER;
  return all_aligned(p.weight) ? ATTS_OK : ATTS_ERROR_ALIGNMENT;
}

atts_status check_packed(const atts_pack_weight_params& p) {
  if (p.packed == nullptr) return ATTS_ERROR_NULL_POINTER;
  return aligned(p.packed, 64) ? ATTS_OK : ATTS_ERROR_ALIGNMENT;
}

}  // namespace

void unpack_columns(const PackedMatrix& packed, int64_t first, uint16_t* out) {
  const int64_t across = packed.in_features / (2 * kPackedWords);
  const PackedIndex* block = packed.block(first, across);
  for (int64_t b = 0; b < across; ++b, ++block)
    unpack_block(*block, packed.data(*block), packed.in_features, out + b * 2 * kPackedWords);
}

}  // namespace atts

extern "C" int atts_pack_weight_cpu_bytes(const atts_pack_weight_params* params, uint64_t* bytes) {
  if (const int status = atts::check(params)) return status;
  if (bytes == nullptr) return ATTS_ERROR_NULL_POINTER;
  *bytes = atts::plan(*params).bytes;
  return ATTS_OK;
}

extern "C" int atts_pack_weight_cpu(const atts_pack_weight_params* params) {
  if (const int status = atts::check(params)) return status;
  if (const int status = atts::check_packed(*params)) return status;
  const atts::Plan plan = atts::plan(*params);
  if (params->packed_bytes < plan.bytes) return ATTS_ERROR_WORKSPACE;
  atts::pack(*params, plan);
  return ATTS_OK;
}

extern "C" int atts_unpack_weight_cpu(const atts_unpack_weight_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_unpack_weight_params& p = *params;
  if (p.out_features < 1 || p.in_features < 1 || p.threads < 1 || !atts::packs(p.out_features, p.in_features))
    return ATTS_ERROR_SHAPE;
  if (p.packed == nullptr || p.weight == nullptr) return ATTS_ERROR_NULL_POINTER;
  if (!atts::aligned(p.packed, 64) || !atts::all_aligned(p.weight)) return ATTS_ERROR_ALIGNMENT;
  if (!atts::is_packed(p.packed, p.out_features, p.in_features)) return ATTS_ERROR_PACKED;
  atts::parallel(p.out_features / atts::kPackedColumns, p.threads, [&](int64_t group) {
    atts::unpack_columns(*static_cast<const atts::PackedMatrix*>(p.packed), group * atts::kPackedColumns,
                         p.weight + group * atts::kPackedColumns * p.in_features);
  });
  return ATTS_OK;
}
