// Sampling by the Gumbel-max trick on the host, without the noise of tokens that cannot win.
//
// A token's noise is at most -log(v) of its uniform v, so it can beat the best so far only where v < exp(its value - best).
// An upper bound of that exponential costs one multiplication, and a few tokens of a row pass.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "atts/atts.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/splitmix.h"

namespace {

using atts::kernels;
using atts::kGolden;
using atts::mix;

float value_of(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Orders bfloat16 bits as their values: 0 .. 65535, with -0 on 0.
uint32_t rank_of(uint16_t bits) {
  if (bits == 0x8000u) bits = 0;
  return bits & 0x8000u ? 0xffffu - bits : bits | 0x8000u;
}

uint16_t bits_of(uint32_t rank) {
  return static_cast<uint16_t>(rank & 0x8000u ? rank & 0x7fffu : 0xffffu - rank);
}

// The filters keep the first few of a row's tokens in the order (value descending, id ascending): those of a higher rank,
// and of this rank those up to this id.
struct Cut {
  uint32_t rank;
  int64_t last;
};

struct Row {
  const uint16_t* logits;
  int64_t vocab;
  float temperature;
  int64_t top_k;
  float top_p, min_p;
  uint64_t seed, position;
};

Cut cut_of(const Row& row, uint32_t highest) {
  thread_local std::vector<int32_t> counts;
  counts.assign(65536, 0);
  for (int64_t id = 0; id < row.vocab; ++id) ++counts[rank_of(row.logits[id])];
  const float largest = value_of(bits_of(highest)) / row.temperature;
  const int64_t limit = row.top_k > 0 && row.top_k < row.vocab ? row.top_k : row.vocab;
  const auto mass = [&](uint32_t rank) { return std::exp(value_of(bits_of(rank)) / row.temperature - largest); };
  double total = 0.0;
  int64_t seen = 0;
  int64_t lowest = highest;
  for (int64_t rank = highest; rank >= 0 && seen < limit; --rank) {
    if (counts[rank] == 0) continue;
    lowest = rank;
    seen += counts[rank];
    total += static_cast<double>(mass(static_cast<uint32_t>(rank))) * counts[rank];
  }
  const double enough = static_cast<double>(row.top_p) * total;
  double before = 0.0;
  Cut cut{highest, row.vocab};
  for (int64_t rank = highest; rank >= lowest; --rank) {
    if (counts[rank] == 0) continue;
    const float each = mass(static_cast<uint32_t>(rank));
    const bool first = rank == static_cast<int64_t>(highest);
    if (each < row.min_p && !first) break;
    int64_t kept = counts[rank];
    if (row.top_p < 1) {
      for (kept = 0; kept < counts[rank] && before < enough; ++kept) before += each;
      if (first && kept == 0) kept = 1;
    }
    if (kept == 0) break;
    cut = {static_cast<uint32_t>(rank), row.vocab};
    if (kept < counts[rank]) {
      for (int64_t id = 0; kept > 0; ++id)
        if (rank_of(row.logits[id]) == static_cast<uint32_t>(rank) && --kept == 0) cut.last = id;
      break;
    }
  }
  return cut;
}

float noise_of(uint64_t bits) {
  float tail = static_cast<float>(static_cast<int64_t>(bits)) * 0x1p-63f;
  if (tail < 0x1p-64f) tail = 0x1p-64f;
  return -std::log(-std::log1p(-tail));
}

int64_t draw(const Row& row) {
  int16_t key;
  uint16_t size;
  kernels().extremes(row.logits, row.vocab, &key, &size);
  const uint32_t highest = key < 0 ? (key == -1 ? 0x8000u : static_cast<uint32_t>(key + 0x8000)) : key | 0x8000u;
  const uint16_t peak = bits_of(highest);
  if (size > 0x7f80u || !std::isfinite(value_of(peak)) || std::isnan(row.temperature)) return -1;
  int64_t best_id = kernels().find(row.logits, row.vocab, peak, peak == 0 ? 0x8000u : peak);
  // A temperature that takes the largest out of the range of float is as good as 0.
  if (row.temperature <= 0 || std::isinf(value_of(peak) / row.temperature)) return best_id;
  const bool filtered = row.top_k > 0 || row.top_p < 1 || row.min_p > 0;
  const Cut cut = filtered ? cut_of(row, highest) : Cut{0, row.vocab};
  const uint64_t stream = mix(mix(row.position * kGolden + row.seed) + row.seed);
  const auto hashed = [&](int64_t id) {
    return mix(stream + (static_cast<uint64_t>(id) + 1) * kGolden) & 0x7FFFFFFFFFFFFFFFu;
  };
  float best = value_of(row.logits[best_id]) / row.temperature + noise_of(hashed(best_id));
  const float slope = 1.44269504f / row.temperature;
  // exp2(y) <= 2^floor(y) * (1 + y - floor(y)): what the bits of a float say when y is written into them. The margin covers
  // the rounding of y and of the sums that are compared.
  const auto shifted = [](float value) {
    const float y = value * 1.44269504f;
    return 127.0f + 63.0f + 0x1p-9f + std::fabs(y) * 0x1p-19f - y;
  };
  float shift = shifted(best);
  const auto contend = [&](int64_t id) {
    const float y = value_of(row.logits[id]) * slope + shift;  // 127 + 63 + log2 of the largest v that can win
    if (!(y > 125.0f)) return;                               // no v is below 2^-64
    const uint64_t bits = hashed(id);
    if (y < 190.0f) {
      const uint32_t pattern = static_cast<uint32_t>(y * 8388608.0f);
      float bound;
      std::memcpy(&bound, &pattern, sizeof bound);
      // The bound may be as low as 2^-2 while v is held at 2^-1 of these units: a v that small always passes.
      if (static_cast<float>(static_cast<int64_t>(bits)) > bound && bits > 1) return;
    }
    if (filtered) {
      const uint32_t rank = rank_of(row.logits[id]);
      if (rank < cut.rank || (rank == cut.rank && id > cut.last)) return;
    }
    const float value = value_of(row.logits[id]) / row.temperature + noise_of(bits);
    if (value > best || (value == best && id < best_id)) {
      best = value;
      best_id = id;
      shift = shifted(best);
    }
  };
  const int64_t whole = row.vocab / 8 * 8;
  uint32_t which = 0;
  for (int64_t id = 0; (id = kernels().contenders(row.logits, id, whole, slope, shift, stream, &which)) < whole; id += 8)
    for (; which; which &= which - 1) contend(id + __builtin_ctz(which));
  for (int64_t id = whole; id < row.vocab; ++id) contend(id);
  return best_id;
}

}  // namespace

extern "C" int atts_sample_cpu(const atts_sample_params* params) {
  if (params == nullptr) return ATTS_ERROR_NULL_POINTER;
  if (params->struct_size != sizeof(atts_sample_params)) return ATTS_ERROR_ABI;
  const atts_sample_params& p = *params;
  if (p.rows < 0 || p.vocab < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (p.rows == 0) return ATTS_OK;
  if (p.logits == nullptr || p.temperature == nullptr || p.top_k == nullptr || p.top_p == nullptr ||
      p.min_p == nullptr || p.seed == nullptr || p.position == nullptr || p.ids == nullptr)
    return ATTS_ERROR_NULL_POINTER;
  atts::parallel(p.rows, p.threads, [&](int64_t i) {
    // An infinite temperature would make NaN of tokens at -inf; NaN stays.
    const float temperature = std::min(p.temperature[i], std::numeric_limits<float>::max());
    p.ids[i] = draw({p.logits + i * p.logits_stride, p.vocab, temperature, p.top_k[i], p.top_p[i], p.min_p[i],
                     static_cast<uint64_t>(p.seed[i]), static_cast<uint64_t>(p.position[i])});
  });
  return ATTS_OK;
}
