// The hash that a token's noise is made of. Internal linkage: what two instruction sets compile must not be merged.
#ifndef ATTS_CPU_SPLITMIX_H_
#define ATTS_CPU_SPLITMIX_H_

#include <cstdint>

namespace atts {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014), of one integer or of a vector of them.
template <class T>
inline __attribute__((always_inline)) T mix(T x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace
}  // namespace atts

#endif  // ATTS_CPU_SPLITMIX_H_
