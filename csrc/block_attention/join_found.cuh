// SPDX-License-Identifier: Apache-2.0
// Merges what was found for a row over different keys, each relative to its own top; writes results.
#pragma once

#include "block_attention/block_attention.cuh"

namespace livevlm {

// Two tops become the higher one. What is relative to them is merged in the same instructions everywhere, so
// that it does not matter which kernel does it.
struct MergeFactors {
  float top, one, other;

  __device__ __forceinline__ MergeFactors(float one_top, float other_top)
      : top(fmaxf(one_top, other_top)),
        one(exp2_approx(one_top - top)),
        other(exp2_approx(other_top - top)) {}

  __device__ __forceinline__ float merged(float a, float b) const { return merged(one, a, other, b); }

  static __device__ __forceinline__ float merged(float one, float a, float other, float b) {
    return fmaf(other, b, __fmul_rn(one, a));
  }
};

// What was found for a row, four dimensions of it.
struct Found {
  float top = kNoTop, sum = 0.0f;
  float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  // Adds what is relative to another top, times `factor`.
  __device__ __forceinline__ void add(float factor, float other_sum, float4 other) {
    sum = fmaf(factor, other_sum, sum);
    out.x = fmaf(factor, other.x, out.x), out.y = fmaf(factor, other.y, out.y);
    out.z = fmaf(factor, other.z, out.z), out.w = fmaf(factor, other.w, out.w);
  }

  __device__ __forceinline__ void merge(const Found& other) {
    const MergeFactors factors(top, other.top);
    top = factors.top;
    sum = factors.merged(sum, other.sum);
    out.x = factors.merged(out.x, other.out.x), out.y = factors.merged(out.y, other.out.y);
    out.z = factors.merged(out.z, other.out.z), out.w = factors.merged(out.w, other.out.w);
  }
};

// What a sum of weighted values is divided by. No key, no weight: zeros; NaN stays NaN.
__device__ __forceinline__ float inverse_of(float sum) {
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}

// The natural logarithm of a sum of exponentials.
__device__ __forceinline__ float log_of(float top, float sum) {
  constexpr float kLn2 = 0.6931471805599453f;
  return sum == 0.0f ? -INFINITY : (top + log2f(sum)) * kLn2;
}

}  // namespace livevlm
