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

// Past L1: for data each thread block reads once. Memory must not be written while the kernel runs.
__device__ __forceinline__ uint4 load_once(const uint4* source) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(source));
  return value;
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

}  // namespace livevlm
