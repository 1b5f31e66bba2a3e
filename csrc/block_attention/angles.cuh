// SPDX-License-Identifier: Apache-2.0
// RoPE, by a table of angles in one of two precisions.
#pragma once

#include "block_attention/block_attention.cuh"

namespace livevlm {

// No table of angles.
struct NoAngles {
  static constexpr int kBytes = 0;
};

struct FloatAngles {
  static constexpr int kBytes = 4;  // of an angle

  static __device__ __forceinline__ float2 two(const uint4 (&words)[2], int i) {
    const uint4 of = words[i / 2];
    return i % 2 ? make_float2(__uint_as_float(of.z), __uint_as_float(of.w))
                 : make_float2(__uint_as_float(of.x), __uint_as_float(of.y));
  }
};

struct HalfAngles {
  static constexpr int kBytes = 2;

  static __device__ __forceinline__ float2 two(const uint4 (&words)[1], int i) {
    const uint4 of = words[0];
    return widen_pair(i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w, TypeTag<__half>{});
  }
};

// The angles of eight dimensions from `first` on, as they are in the table.
template <typename Angle>
struct Angles8 {
  static constexpr int kWide = Angle::kBytes / 2;
  uint4 cosine[kWide], sine[kWide];

  __device__ __forceinline__ void load(const BlockAttention& op, int64_t row, int first) {
    const auto dims = static_cast<int>(op.head_dim);
    const char* const angles = static_cast<const char*>(op.cos_sin_cache) + row * (dims * Angle::kBytes);
    const auto* low = reinterpret_cast<const uint4*>(angles + first * Angle::kBytes);
    const auto* high = reinterpret_cast<const uint4*>(angles + (first + dims / 2) * Angle::kBytes);
#pragma unroll
    for (int i = 0; i < kWide; ++i) cosine[i] = __ldg(low + i), sine[i] = __ldg(high + i);
  }

  // Of a row in shared memory.
  __device__ __forceinline__ void load_shared(const void* row, int dims, int first) {
    const char* const angles = static_cast<const char*>(row);
    const auto* low = reinterpret_cast<const uint4*>(angles + first * Angle::kBytes);
    const auto* high = reinterpret_cast<const uint4*>(angles + (first + dims / 2) * Angle::kBytes);
#pragma unroll
    for (int i = 0; i < kWide; ++i) cosine[i] = low[i], sine[i] = high[i];
  }

  // Keeps the compiler from widening them before `word` is computed, in registers that it does not have.
  __device__ __forceinline__ void widen_after(uint32_t& word) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      asm volatile(""
                   : "+r"(word), "+r"(cosine[i].x), "+r"(cosine[i].y), "+r"(cosine[i].z), "+r"(cosine[i].w));
      asm volatile("" : "+r"(word), "+r"(sine[i].x), "+r"(sine[i].y), "+r"(sine[i].z), "+r"(sine[i].w));
    }
  }
};

// Rotates eight pairs of elements, head_dim / 2 apart.
template <typename T, typename Angle>
__device__ __forceinline__ void rotate8(uint4& low, uint4& high, const Angles8<Angle>& angles) {
  uint32_t* const lows[4] = {&low.x, &low.y, &low.z, &low.w};
  uint32_t* const highs[4] = {&high.x, &high.y, &high.z, &high.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 a = widen_pair(*lows[i], TypeTag<T>{}), b = widen_pair(*highs[i], TypeTag<T>{});
    const float2 c = Angle::two(angles.cosine, i), s = Angle::two(angles.sine, i);
    *lows[i] = narrow_pair(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y, TypeTag<T>{});
    *highs[i] = narrow_pair(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y, TypeTag<T>{});
  }
}

// Angles of whichever table the op has.
struct AnyAngles8 {
  Angles8<FloatAngles> words;  // in half precision the first of two

  __device__ __forceinline__ void load(const BlockAttention& op, int64_t row, int first) {
    if (!op.cos_sin_half) return words.load(op, row, first);
    Angles8<HalfAngles> half;
    half.load(op, row, first);
    words.cosine[0] = half.cosine[0], words.sine[0] = half.sine[0];
  }

  template <typename T>
  __device__ __forceinline__ void rotate(const BlockAttention& op, uint4& low, uint4& high) const {
    if (!op.cos_sin_half) return rotate8<T>(low, high, words);
    rotate8<T>(low, high, Angles8<HalfAngles>{{words.cosine[0]}, {words.sine[0]}});
  }
};

// Rotates by row `row` of the op's table, dimensions from `first` on.
template <typename T>
__device__ __forceinline__ void rotate_by_table(const BlockAttention& op, int64_t row, int first, uint4& low,
                                                uint4& high) {
  const auto rotate = [&](auto angle) {
    Angles8<typename decltype(angle)::type> angles;
    angles.load(op, row, first);
    rotate8<T>(low, high, angles);
  };
  op.cos_sin_half ? rotate(TypeTag<HalfAngles>{}) : rotate(TypeTag<FloatAngles>{});
}

}  // namespace livevlm
