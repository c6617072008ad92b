// Elements of the three dtypes as fp32, one at a time. Included by files that are compiled once only.
#ifndef ATTS_CPU_ELEMENT_H_
#define ATTS_CPU_ELEMENT_H_

#include <cstdint>
#include <cstring>

#include "atts/atts.h"

namespace atts::host {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Float32 {
  using type = float;
  static float widen(float value) { return value; }
  static float narrow(float value) { return value; }
};

struct Float16 {
  using type = uint16_t;
  static float widen(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity and NaN
    if (rest >= 0x400u) return bits_as<float>(sign | ((rest << 13) + (112u << 23)));
    const float subnormal = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -subnormal : subnormal;
  }
  // To nearest, ties to even.
  static uint16_t narrow(float value) {
    const uint32_t bits = bits_as<uint32_t>(value), size = bits & 0x7fffffffu;
    const uint32_t sign = bits >> 16 & 0x8000u;
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (size < 0x38800000u)  // a unit of 0.5f is the smallest half: the addition rounds
      return static_cast<uint16_t>(sign | (bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - bits_as<uint32_t>(0.5f)));
    return static_cast<uint16_t>(sign | (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13);
  }
};

struct Bfloat16 {
  using type = uint16_t;
  static float widen(uint16_t half) { return bits_as<float>(static_cast<uint32_t>(half) << 16); }
  static uint16_t narrow(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
};

// body(element) for the element of a dtype that was checked.
template <class Body>
void with_element(int32_t dtype, Body body) {
  if (dtype == ATTS_FLOAT32) return body(Float32{});
  if (dtype == ATTS_FLOAT16) return body(Float16{});
  body(Bfloat16{});
}

}  // namespace atts::host

#endif  // ATTS_CPU_ELEMENT_H_
