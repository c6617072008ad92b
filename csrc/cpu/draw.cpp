// The passes over a row of logits that sampling makes, several tokens at a time; what they leave is settled one by one.
#include <limits>

#include "cpu/kernels.h"
#include "cpu/splitmix.h"
#include "cpu/table.h"
#include "cpu/vector.h"

namespace atts {
namespace ATTS_ISA {

namespace {

typedef uint64_t W8 __attribute__((vector_size(64)));

template <class T>
void extremes(const T* x, int64_t n, OrderOf<T>* highest, BitsOf<T>* size) {
  using Order = OrderOf<T>;
  constexpr auto kMagnitude = std::numeric_limits<Order>::max();
  Order most = std::numeric_limits<Order>::min(), large = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = load<Order>(x + i), magnitude = static_cast<Order>(bits & kMagnitude);
    // Ordered as the values are, -0 below 0.
    const auto key = static_cast<Order>(bits ^ ((bits >> (8 * sizeof(T) - 1)) & kMagnitude));
    most = key > most ? key : most;
    large = magnitude > large ? magnitude : large;
  }
  *highest = most;
  *size = static_cast<BitsOf<T>>(large);
}

template <class T>
int64_t find(const T* x, int64_t n, BitsOf<T> a, BitsOf<T> b) {
  using Bits = BitsOf<T>;
  constexpr int64_t kStep = 64;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    Bits hit = 0;
    for (int64_t j = 0; j < kStep; ++j) {
      const auto own = load<Bits>(x + i + j);
      hit |= static_cast<Bits>((own == a) | (own == b));
    }
    if (hit) break;
  }
  while (i < n && load<Bits>(x + i) != a && load<Bits>(x + i) != b) ++i;
  return i;
}

template <class T>
int64_t contenders(const T* logits, int64_t first, int64_t n, float slope, float shift, uint64_t stream,
                   uint32_t* which) {
  for (int64_t id = first; id + 8 <= n; id += 8) {
    // As `draw` has it, with the hash cut to its upper half and the bound widened by more than that and rounding take.
    F8 y = load8(logits + id) * slope + shift;
    const I8 live = y > 125.0f;
    W8 bits{0, 1, 2, 3, 4, 5, 6, 7};
    bits = mix(stream + (bits + static_cast<uint64_t>(id + 1)) * kGolden);
    const F8 upper = __builtin_convertvector((I8)__builtin_convertvector(bits >> 32, U8) & 0x7fffffff, F8);
    y = select(y > 190.0f, all(190.0f), select(live, y, all(125.0f)));
    const F8 bound = (F8)__builtin_convertvector((y - 32.0f) * 8388608.0f, I8);
    const I8 may = live & (upper <= bound * (1.0f + 0x1p-16f) + 2.0f);
    uint32_t found = 0;
    for (int lane = 0; lane < 8; ++lane) found |= static_cast<uint32_t>(may[lane] & 1) << lane;
    if (found) {
      *which = found;
      return id;
    }
  }
  return n;
}

}  // namespace

#define ATTS_DEFINE_DRAW(name, T)                                                                                      \
  void extremes_##name(const T* x, int64_t n, OrderOf<T>* highest, BitsOf<T>* size) { extremes(x, n, highest, size); } \
  int64_t find_##name(const T* x, int64_t n, BitsOf<T> a, BitsOf<T> b) { return find(x, n, a, b); }                    \
  int64_t contenders_##name(const T* logits, int64_t first, int64_t n, float slope, float shift, uint64_t stream,      \
                            uint32_t* which) {                                                                         \
    return contenders(logits, first, n, slope, shift, stream, which);                                                  \
  }

ATTS_DEFINE_DRAW(bf16, uint16_t)
ATTS_DEFINE_DRAW(fp32, float)

}  // namespace ATTS_ISA
}  // namespace atts
