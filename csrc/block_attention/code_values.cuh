// SPDX-License-Identifier: Apache-2.0
// Weights times values of a quantised pool: what code_ring.cuh says of them.
#pragma once

#include "block_attention/code_ring.cuh"

namespace livevlm {

// out += V^T * P^T, as RowSums::add. A power of two keeps scaled weights, of at most kRaiseAbove, below what
// halves hold; it is lowered when a larger scale comes.
template <int kHeadDim, typename Format, int kRing, int kBlocksAtOnce>
__device__ __forceinline__ void CodeRing<kHeadDim, Format, kRing, kBlocksAtOnce>::add(
    Sums& sums, const float (&weights)[4], int step) const {
  constexpr float kMostScale = 128.0f;
  const uint32_t lane = lane_again();
  float scales[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(at(step, kValueScales))[lane / 4 + i * 8];
    scales[i] = __uint_as_float(word);
    if constexpr (kInt4) {
      const float2 pair = widen_pair(word, TypeTag<__half>{});
      scales[i] = pair.x;
      const float least = fmaf(8.0f, pair.x, pair.y);  // codes are centred
#pragma unroll
      for (int j = 0; j < 2; ++j) sums.offset[j] = fmaf(weights[2 * i + j], least, sums.offset[j]);
    }
  }
  const float most = fmaxf(scales[0], scales[1]);
  if (__any_sync(~0u, most * sums.power > kMostScale)) {  // also for the first keys
    const uint32_t exponent = __reduce_max_sync(~0u, __float_as_uint(most)) >> 23;
    const float power =
        __uint_as_float(static_cast<uint32_t>(min(254, 260 - static_cast<int>(exponent))) << 23);
    const float change = power / sums.power;
    sums.power = power;
#pragma unroll
    for (int half = 0; half < kDim / 64; ++half) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums.out[half][m][j] *= change;
      }
    }
  }
  uint32_t b[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float scale = scales[i] * sums.power;
    b[i] = transpose_8x8(narrow_pair(weights[2 * i] * scale, weights[2 * i + 1] * scale, TypeTag<__half>{}));
  }
  uint2 words[4] = {};
  // Channel 2 m + i % 2 of two keys.
  const auto two_codes = [&](int m, int i) {
    const uint2 first = words[i / 2 * 2], second = words[i / 2 * 2 + 1];
    constexpr uint32_t kBytes[4] = {0x4400, 0x5511, 0x6622, 0x7733};  // twice each, for int4
    constexpr uint32_t kOnce[4] = {0x0040, 0x0051, 0x0062, 0x0073};
    const int byte = m % 2 * 2 + i % 2;
    return __byte_perm(m < 2 ? first.x : first.y, m < 2 ? second.x : second.y,
                       kInt4 ? kBytes[byte] : kOnce[byte]);
  };
  if constexpr (kInt4) {
    values(step, 0, words);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t low[4], high[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t spread = two_codes(m, i);
        low[i] = low_steps<8>(kDim == 64 ? spread >> lane / 16 * 4 : spread);
        high[i] = high_steps<8>(spread);
      }
      mma_m16n8k16(sums.out[0][m], low, b, TypeTag<__half>{});
      if constexpr (kDim == 128) mma_m16n8k16(sums.out[1][m], high, b, TypeTag<__half>{});
    }
  } else {
#pragma unroll
    for (int half = 0; half < kDim / 64; ++half) {
      values(step, half, words);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint32_t a[4] = {widen_e4m3(two_codes(m, 0)), widen_e4m3(two_codes(m, 1)),
                               widen_e4m3(two_codes(m, 2)), widen_e4m3(two_codes(m, 3))};
        mma_m16n8k16(sums.out[half][m], a, b, TypeTag<__half>{});
      }
    }
  }
}

}  // namespace livevlm
