// SPDX-License-Identifier: Apache-2.0
// Vectors of up to 16 bytes of float32, float16 or bfloat16, loaded in one instruction and widened to
// float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace livevlm {

template <typename T>
inline constexpr int kVectorSize = 16 / int{sizeof(T)};

template <typename T, int kSize>
struct Vec;

// Past L1: for data each thread block reads once. The calling thread must not have written it.
__device__ __forceinline__ uint4 load_once(const uint4* source) {
#ifdef LIVEVLM_EMULATED
  return emu::load_once(source);
#else
  uint4 value;
  asm("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(source));
  return value;
#endif
}

__device__ __forceinline__ float2 widen_pair(uint32_t word, TypeTag<__nv_bfloat16>) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

__device__ __forceinline__ float2 widen_pair(uint32_t word, TypeTag<__half>) {
  __half2 pair;
  *reinterpret_cast<uint32_t*>(&pair) = word;
  return __half22float2(pair);
}

template <typename T>
struct Vec<T, 8> {
  static_assert(sizeof(T) == 2, "16 bytes");
  uint4 words{};

  __device__ __forceinline__ void load(const T* source) {
    words = load_once(reinterpret_cast<const uint4*>(source));
  }
  __device__ __forceinline__ void widen(float (&values)[8]) const {
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen_pair(pairs[i], TypeTag<T>{});
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
};

template <>
struct Vec<float, 4> {
  uint4 words{};

  __device__ __forceinline__ void load(const float* source) {
    words = load_once(reinterpret_cast<const uint4*>(source));
  }
  __device__ __forceinline__ void widen(float (&values)[4]) const {
    values[0] = __uint_as_float(words.x);
    values[1] = __uint_as_float(words.y);
    values[2] = __uint_as_float(words.z);
    values[3] = __uint_as_float(words.w);
  }
};

// One element: for strides and alignments that a vector load cannot serve.
template <typename T>
struct Vec<T, 1> {
  T element{};

  __device__ __forceinline__ void load(const T* source) { element = *source; }
  __device__ __forceinline__ void widen(float (&values)[1]) const { values[0] = static_cast<float>(element); }
};

__device__ __forceinline__ uint32_t narrow_pair(float low, float high, TypeTag<__nv_bfloat16>) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t narrow_pair(float low, float high, TypeTag<__half>) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Writes kSize floats; 16 bytes at a time if there are that many, and then `target` must be 16-byte aligned.
template <int kSize>
__device__ __forceinline__ void store(float* target, const float (&values)[kSize]) {
  if constexpr (kSize % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      *reinterpret_cast<float4*>(target + i) =
          make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) target[i] = values[i];
  }
}

// The same, rounded to T.
template <typename T, int kSize>
__device__ __forceinline__ void store_as(T* target, const float (&values)[kSize]) {
  if constexpr (sizeof(T) == 4) {
    store(target, values);
  } else if constexpr (kSize == 8) {
    *reinterpret_cast<uint4*>(target) = make_uint4(
        narrow_pair(values[0], values[1], TypeTag<T>{}), narrow_pair(values[2], values[3], TypeTag<T>{}),
        narrow_pair(values[4], values[5], TypeTag<T>{}), narrow_pair(values[6], values[7], TypeTag<T>{}));
  } else {
    static_assert(kSize == 1, "one element, or 16 bytes");
    const uint32_t pair = narrow_pair(values[0], 0.0f, TypeTag<T>{});
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(pair);
  }
}

}  // namespace livevlm
