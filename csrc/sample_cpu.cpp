// Sampling by the Gumbel-max trick on the host, without the noise of tokens that cannot win.
//
// A token's noise is at most -log(v) of its uniform v, so it can beat the best so far only where v < exp(its value - best).
// An upper bound of that exponential costs one multiplication, and a few tokens of a row pass.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "atts/atts.h"
#include "checks.h"
#include "cpu/element.h"
#include "cpu/kernels.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/splitmix.h"

namespace {

using atts::BitsOf;
using atts::kernels;
using atts::kGolden;
using atts::mix;
using atts::OrderOf;
using atts::host::bits_as;

template <class T>
constexpr BitsOf<T> kSign = static_cast<BitsOf<T>>(BitsOf<T>{1} << (8 * sizeof(T) - 1));

template <class T>
constexpr BitsOf<T> kInfinity = static_cast<BitsOf<T>>(0x7f800000u >> (8 * (sizeof(float) - sizeof(T))));

constexpr int64_t kSerialTokens = 4096;  // of all rows: a thread draws from them in the time of handing some over

template <class T>
BitsOf<T> bits_of(T element) {
  return bits_as<BitsOf<T>>(element);
}

float value_of(float element) { return element; }
float value_of(uint16_t bits) { return atts::host::Bfloat16::widen(bits); }

// Orders elements as their values, from 0 on, with -0 on 0.
template <class T>
BitsOf<T> rank_of(T element) {
  BitsOf<T> bits = bits_of(element);
  if (bits == kSign<T>) bits = 0;
  return static_cast<BitsOf<T>>(bits & kSign<T> ? ~bits : bits | kSign<T>);
}

template <class T>
T at_rank(BitsOf<T> rank) {
  return bits_as<T>(static_cast<BitsOf<T>>(rank & kSign<T> ? rank & ~kSign<T> : ~rank));
}

// The filters keep the first few of a row's tokens in the order (value descending, id ascending): those of a higher rank,
// and of this rank those up to this id.
struct Cut {
  uint32_t rank;
  int64_t last;
};

template <class T>
struct Row {
  const T* logits;
  int64_t vocab;
  float temperature;
  int64_t top_k;
  float top_p, min_p;
  uint64_t seed, position;
};

// bfloat16 has few values: tokens are counted by rank.
Cut cut_of(const Row<uint16_t>& row, uint32_t highest) {
  thread_local std::vector<int32_t> counts;
  counts.assign(65536, 0);
  for (int64_t id = 0; id < row.vocab; ++id) ++counts[rank_of(row.logits[id])];
  const auto value = [](int64_t rank) { return value_of(at_rank<uint16_t>(static_cast<uint16_t>(rank))); };
  const float largest = value(highest) / row.temperature;
  const int64_t limit = row.top_k > 0 && row.top_k < row.vocab ? row.top_k : row.vocab;
  const auto mass = [&](int64_t rank) { return std::exp(value(rank) / row.temperature - largest); };
  double total = 0.0;
  int64_t seen = 0;
  int64_t lowest = highest;
  for (int64_t rank = highest; rank >= 0 && seen < limit; --rank) {
    if (counts[rank] == 0) continue;
    lowest = rank;
    seen += counts[rank];
    total += static_cast<double>(mass(rank)) * counts[rank];
  }
  const double enough = static_cast<double>(row.top_p) * total;
  double before = 0.0;
  Cut cut{highest, row.vocab};
  for (int64_t rank = highest; rank >= lowest; --rank) {
    if (counts[rank] == 0) continue;
    const float each = mass(rank);
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

// A heap gives the tokens in order, as far as they are asked for.
Cut cut_of(const Row<float>& row, uint32_t highest) {
  using Token = std::pair<uint32_t, int64_t>;  // rank, and an id that is larger where it comes earlier
  thread_local std::vector<Token> heap;
  thread_local std::vector<float> masses;  // of those that were taken out of it, the latest last
  heap.clear();
  masses.clear();
  for (int64_t id = 0; id < row.vocab; ++id) heap.emplace_back(rank_of(row.logits[id]), -id);
  std::make_heap(heap.begin(), heap.end());
  auto rest = heap.end();
  const float largest = value_of(at_rank<float>(highest)) / row.temperature;
  const auto mass = [&](uint32_t rank) { return std::exp(value_of(at_rank<float>(rank)) / row.temperature - largest); };
  const auto take = [&] {
    std::pop_heap(heap.begin(), rest--);
    masses.push_back(mass(rest->first));
  };
  double total = 0.0;
  int64_t limit = row.vocab;
  if (row.top_k > 0 && row.top_k < row.vocab) {  // ties of the k-th stay
    for (limit = 0; limit < row.top_k || (rest != heap.begin() && heap.front().first == rest->first); ++limit) {
      take();
      total += static_cast<double>(masses.back());
    }
  } else if (row.top_p < 1) {
    for (const Token& token : heap) total += static_cast<double>(mass(token.first));
  }
  const double enough = static_cast<double>(row.top_p) * total;
  double before = 0.0;
  int64_t kept = 0;
  for (; kept < limit; ++kept) {
    if (kept == static_cast<int64_t>(masses.size())) take();
    const float each = masses[static_cast<size_t>(kept)];
    const bool first = heap[heap.size() - 1 - static_cast<size_t>(kept)].first == highest;
    if (each < row.min_p && !first) break;
    if (row.top_p < 1 && kept > 0 && !(before < enough)) break;
    before += static_cast<double>(each);
  }
  const Token& last = heap[heap.size() - static_cast<size_t>(kept)];
  return {last.first, -last.second};
}

float noise_of(uint64_t bits) {
  float tail = static_cast<float>(static_cast<int64_t>(bits)) * 0x1p-63f;
  if (tail < 0x1p-64f) tail = 0x1p-64f;
  return -std::log(-std::log1p(-tail));
}

template <class T>
int64_t draw(const Row<T>& row) {
  const auto& run = kernels().of<T>();
  OrderOf<T> key;
  BitsOf<T> size;
  run.extremes(row.logits, row.vocab, &key, &size);
  // -1 is the key of -0, the rank of 0.
  const BitsOf<T> highest = static_cast<BitsOf<T>>(static_cast<BitsOf<T>>(key == -1 ? 0 : key) ^ kSign<T>);
  const T peak = at_rank<T>(highest);
  if (size > kInfinity<T> || !std::isfinite(value_of(peak)) || std::isnan(row.temperature)) return -1;
  const BitsOf<T> own = bits_of(peak);
  int64_t best_id = run.find(row.logits, row.vocab, own, own == 0 ? kSign<T> : own);
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
  // Next to the smallest temperatures and the largest quotients the bound is not a number, and every token contends.
  const bool bounded = std::isfinite(slope) && std::isfinite(shift);
  const auto contend = [&](int64_t id) {
    const float y = value_of(row.logits[id]) * slope + shift;  // 127 + 63 + log2 of the largest v that can win
    if (bounded && !(y > 125.0f)) return;                      // no v is below 2^-64
    const uint64_t bits = hashed(id);
    if (bounded && y < 190.0f) {
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
  const int64_t whole = bounded ? row.vocab / 8 * 8 : 0;
  uint32_t which = 0;
  for (int64_t id = 0; (id = run.contenders(row.logits, id, whole, slope, shift, stream, &which)) < whole; id += 8)
    for (; which; which &= which - 1) contend(id + __builtin_ctz(which));
  for (int64_t id = whole; id < row.vocab; ++id) contend(id);
  return best_id;
}

}  // namespace

extern "C" int atts_sample_cpu(const atts_sample_params* params) {
  if (const int status = atts::check_struct(params)) return status;
  const atts_sample_params& p = *params;
  if (p.rows < 0 || p.vocab < 1 || p.threads < 1) return ATTS_ERROR_SHAPE;
  if (const int status = atts::check_dtype(p.dtype)) return status;
  const int64_t bytes = atts::element_bytes(p.dtype);
  if (const int status = atts::check_strides(p.rows, 1, p.vocab, p.logits_stride, p.vocab, bytes)) return status;
  if (!atts::aligned(p.logits, bytes) ||
      !atts::all_aligned(p.temperature, p.top_k, p.top_p, p.min_p, p.seed, p.position, p.ids))
    return ATTS_ERROR_ALIGNMENT;
  if (p.rows == 0) return ATTS_OK;
  if (p.logits == nullptr || p.temperature == nullptr || p.top_k == nullptr || p.top_p == nullptr ||
      p.min_p == nullptr || p.seed == nullptr || p.position == nullptr || p.ids == nullptr)
    return ATTS_ERROR_NULL_POINTER;
  const int threads = p.rows * p.vocab < kSerialTokens ? 1 : p.threads;
  atts::with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    atts::parallel(p.rows, threads, [&](int64_t i) {
      // An infinite temperature would make NaN of tokens at -inf; NaN stays.
      const float temperature = std::min(p.temperature[i], std::numeric_limits<float>::max());
      p.ids[i] =
          draw<T>({static_cast<const T*>(p.logits) + i * p.logits_stride, p.vocab, temperature, p.top_k[i], p.top_p[i],
                   p.min_p[i], static_cast<uint64_t>(p.seed[i]), static_cast<uint64_t>(p.position[i])});
    });
  });
  return ATTS_OK;
}
