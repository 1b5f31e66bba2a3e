// SPDX-License-Identifier: Apache-2.0
// 16-bit floats for CPU kernels, widened to float32 eight at a time where the TU's instruction set can.
//
// CPU kernels are compiled once per instruction set, each inside its own LIVEVLM_CPU namespace: a function
// shared by name would be merged by the linker, and the AVX2 copy might run on a CPU without AVX2.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace livevlm::LIVEVLM_CPU {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float value) {
  return value;
}

inline float to_float(BFloat16 value) {
  return bits_to_float(uint32_t{value.bits} << 16);
}

inline float to_float(Half value) {
#ifdef __F16C__
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Subnormals are multiples of 2^-24; inf and NaN keep their all-ones exponent.
  if (magnitude < 0x0400u) {
    const float small = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -small : small;
  }
  const uint32_t exponent_bias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  return bits_to_float(sign | ((magnitude << 13) + exponent_bias));
#endif
}

template <typename T>
T from_float(float value);  // nearest, ties to even

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  if (value != value) return {0x7fc0};
  const uint32_t bits = float_to_bits(value);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Half from_float<Half>(float value) {
#ifdef __F16C__
  return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t sign = float_to_bits(value) >> 16 & 0x8000u;
  const uint32_t magnitude = float_to_bits(value) & 0x7fffffffu;
  uint32_t bits;
  if (magnitude > 0x7f800000u) {
    bits = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    bits = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // A multiple of 2^-24: adding 0.5, whose last bit is worth just that, rounds.
    bits = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    bits = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | bits)};
#endif
}

inline constexpr int kLanes = 8;

template <typename T>
inline void load_floats(const T* source, float (&values)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) values[i] = to_float(source[i]);
}

#ifdef __F16C__
// GCC does not vectorise the scalar conversion.
template <>
inline void load_floats(const Half* source, float (&values)[kLanes]) {
  _mm256_storeu_ps(values, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
}
#endif

// Calls body(index, value) for each of `count` elements. With stride 1 the calls vectorise.
template <typename T, typename Body>
inline void for_each_float(const T* source, int64_t count, int64_t stride, Body body) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) {
      float values[kLanes];
      load_floats(source + i, values);
      for (int lane = 0; lane < kLanes; ++lane) body(i + lane, values[lane]);
    }
  }
  for (; i < count; ++i) body(i, to_float(source[i * stride]));
}

// Calls body(TypeTag<T>{}) with the element type of `dtype`.
template <typename Body>
inline void dispatch_float(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kFloat16:
      return body(TypeTag<Half>{});
    case DType::kBFloat16:
      return body(TypeTag<BFloat16>{});
  }
}

}  // namespace livevlm::LIVEVLM_CPU
