// SPDX-License-Identifier: Apache-2.0
// A register of floats at a time: what CPU kernels with sums need, because GCC does not reorder those.
//
// The order of a sum depends on the length of its row and on the build, on nothing else. Like cpu_float.h,
// all of it is per instruction set; that is also why there is no std::vector here.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "common/cpu_float.h"

namespace livevlm::LIVEVLM_CPU {

// GCC keeps wider vectors than the processor has in memory.
#ifdef __AVX__
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif
using Lanes = float __attribute__((vector_size(4 * kWidth)));
using IntLanes = int32_t __attribute__((vector_size(4 * kWidth)));
using Words = uint32_t __attribute__((vector_size(4 * kWidth)));

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Uninitialised memory for the time of a call.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

inline Lanes broadcast(float value) {
  return value - Lanes{};  // exact, and free
}

inline Lanes load(const float* source) {
  Lanes lanes;
  std::memcpy(&lanes, source, sizeof lanes);
  return lanes;
}

template <typename T>
inline Words load_words(const T* source) {
  uint16_t __attribute__((vector_size(2 * kWidth))) narrow;
  static_assert(sizeof(T) == 2);
  std::memcpy(&narrow, source, sizeof narrow);
  return __builtin_convertvector(narrow, Words);
}

inline Lanes load(const BFloat16* source) {
  return reinterpret_cast<Lanes>(load_words(source) << 16);
}

inline Lanes load(const Half* source) {
#ifdef __F16C__
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  // The exponent of float32 is biased by 112 more; a product gets subnormals right, too.
  const Words bits = load_words(source), magnitude = (bits & 0x7fffu) << 13;
  const Words scaled = reinterpret_cast<Words>(reinterpret_cast<Lanes>(magnitude) * 0x1p112f);
  const Words special = magnitude | 0x7f800000u;  // infinity and NaN
  return reinterpret_cast<Lanes>((magnitude >= 0x0f800000u ? special : scaled) | (bits & 0x8000u) << 16);
#endif
}

// `count` elements, at most kWidth, and zeros.
template <typename T>
inline Lanes gather(const T* source, int64_t count, int64_t stride) {
  float values[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(source[i * stride]);
  return load(values);
}

inline void store(float* target, Lanes lanes) {
  std::memcpy(target, &lanes, sizeof lanes);
}

// The first `count` lanes, rounded to T.
template <typename T>
inline void store(T* target, Lanes lanes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = from_float<T>(lanes[i]);
}

// Calls body(index, lanes) for every kWidth of `count` elements; the last lanes are filled up with zeros.
template <typename T, typename Body>
inline void for_each_lanes(const T* source, int64_t count, int64_t stride, Body body) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kWidth <= count; i += kWidth) body(i, load(source + i));
  }
  for (; i < count; i += kWidth)
    body(i, gather(source + i * stride, count - i < kWidth ? count - i : kWidth, stride));
}

inline float sum(Lanes lanes) {
  float total[kWidth];
  for (int i = 0; i < kWidth; ++i) total[i] = lanes[i];
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) total[i] += total[i + half];
  }
  return total[0];
}

inline Lanes select(IntLanes mask, Lanes yes, Lanes no) {
  return mask ? yes : no;
}

// `b` where either is NaN.
inline Lanes maximum(Lanes a, Lanes b) {
  return a > b ? a : b;
}

// exp of lanes that are not positive, within 2 units in the last place. It is 0 below -87, close to where
// float32 has only subnormals left; NaN stays NaN.
inline Lanes exp_not_positive(Lanes x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Lanes shifted = x * 0x1.715476p0f + kRound;
  const Lanes power = shifted - kRound;
  const Lanes rest = x - power * 0x1.62e400p-1f - power * 0x1.7f7d1cp-20f;  // log(2) in two parts
  Lanes result = rest * (1.0f / 5040.0f) + 1.0f / 720.0f;
  result = result * rest + 1.0f / 120.0f;
  result = result * rest + 1.0f / 24.0f;
  result = result * rest + 1.0f / 6.0f;
  result = result * rest + 0.5f;
  result = result * rest + 1.0f;
  result = result * rest + 1.0f;
  const Words exponent = reinterpret_cast<Words>(shifted) << 23;  // the high bits of kRound fall out
  const Words one = reinterpret_cast<Words>(broadcast(1.0f));
  return select(x < -87.0f, Lanes{}, result * reinterpret_cast<Lanes>(exponent + one));
}

// What a matrix product is made of: dot products of rows with the columns of a panel, [depth][kPanel].
inline constexpr int kPanel = 2 * kWidth;
inline constexpr int kDotRows = 6;  // 12 sums, and what they are added from, are all that 16 registers hold

struct DotSums {
  Lanes at[kDotRows][2];
};

// `rows`: kDotRows rows, `pitch` apart. A sum runs over `depth` in order, whichever its row and column are.
inline DotSums dot_panel(const float* rows, int64_t pitch, const float* panel, int64_t depth) {
  DotSums sums{};
  for (int64_t i = 0; i < depth; ++i) {
    const Lanes low = load(panel + i * kPanel);
    const Lanes high = load(panel + i * kPanel + kWidth);
#pragma GCC unroll 6
    for (int row = 0; row < kDotRows; ++row) {
      const Lanes factor = broadcast(rows[row * pitch + i]);
      sums.at[row][0] += factor * low;
      sums.at[row][1] += factor * high;
    }
  }
  return sums;
}

}  // namespace livevlm::LIVEVLM_CPU
