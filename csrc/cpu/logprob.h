// A log-probability from the blocks of its row. Included by files that are compiled once only.
#ifndef ATTS_CPU_LOGPROB_H_
#define ATTS_CPU_LOGPROB_H_

#include <cmath>
#include <cstdint>
#include <limits>

namespace atts {

// target - log sum exp of the blocks' (peak, sum of exp(value - peak)), which lie stride apart.
inline float logprob_of(float target, const float* peaks, const float* sums, int64_t blocks, int64_t stride) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  float peak = kNothing;
  for (int64_t b = 0; b < blocks; ++b) peak = std::fmax(peak, peaks[b * stride]);
  double total = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    // A block of nothing but -inf has the sum NaN (-inf less itself) and the weight 0.
    if (std::isnan(sums[b * stride]) && peaks[b * stride] == kNothing && std::isfinite(peak)) continue;
    total += static_cast<double>(sums[b * stride]) * std::exp(static_cast<double>(peaks[b * stride]) - peak);
  }
  return static_cast<float>(static_cast<double>(target) - peak - std::log(total));
}

}  // namespace atts

#endif  // ATTS_CPU_LOGPROB_H_
