// SPDX-License-Identifier: Apache-2.0
// Numbers of quantised pools, widened: e4m3, and steps of four bits. What `quantize_blocks` says of them is
// in livevlm_kernels/quantize_blocks.py. Half precision holds all codes.
#pragma once

#include "block_attention/block_attention.h"
#include "common/cuda_vec.cuh"
#include "common/ptx.cuh"

namespace livevlm {

struct Fp8 {
  static constexpr PoolFormat kFormat = PoolFormat::kFp8;
  static constexpr int kBits = 8;
};

struct Int4 {
  static constexpr PoolFormat kFormat = PoolFormat::kInt4;
  static constexpr int kBits = 4;
};

// Pairs of halves, as words.
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const __half2 result = __hfma2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b),
                                 *reinterpret_cast<const __half2*>(&c));
  return *reinterpret_cast<const uint32_t*>(&result);
}

__device__ __forceinline__ uint32_t mul2(uint32_t a, uint32_t b) {
  const __half2 result =
      __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&result);
}

// a b - c d
__device__ __forceinline__ uint32_t difference2(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t other = mul2(c, d);
  const __half2 result = __hfma2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b),
                                 __hneg2(*reinterpret_cast<const __half2*>(&other)));
  return *reinterpret_cast<const uint32_t*>(&result);
}

__device__ __forceinline__ uint32_t add2(uint32_t a, uint32_t b) {
  const __half2 result =
      __hadd2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&result);
}

// Two numbers in e4m3, in the low half of a word, as halves: exactly.
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t codes) {
#if !defined(LIVEVLM_EMULATED) && __CUDA_ARCH__ >= 890
  return e4m3_to_halves(static_cast<uint16_t>(codes));
#else
  // Bits as those of halves, whose exponent is biased by 8 more.
  const uint32_t spread = __byte_perm(codes, 0, 0x1404);
  return mul2((spread & 0x80008000u) | (spread & 0x7f007f00u) >> 1, 0x5c005c00u);
#endif
}

// Eight numbers.
__device__ __forceinline__ uint4 widen_e4m3(uint2 codes) {
  return make_uint4(widen_e4m3(codes.x), widen_e4m3(codes.x >> 16), widen_e4m3(codes.y),
                    widen_e4m3(codes.y >> 16));
}

// The low, or high, four bits of bytes 0 and 2 as halves, less kLess, exactly.
template <int kLess>
__device__ __forceinline__ uint32_t low_steps(uint32_t spread) {
  static_assert(kLess == 0 || kLess == 8, "-1024 or -1032");
  return add2(and_or(spread, 0x000f000fu, 0x64006400u), kLess ? 0xe408e408u : 0xe400e400u);
}

template <int kLess>
__device__ __forceinline__ uint32_t high_steps(uint32_t spread) {
  return fma2(and_or(spread, 0x00f000f0u, 0x64006400u), 0x2c002c00u, kLess ? 0xd480d480u : 0xd400d400u);
}

// ---- one element, or eight, of a pool of any strides

__device__ __forceinline__ float from_e4m3(uint32_t code) {
  const float scaled = __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20);
  return scaled * 1.329227995784916e36f;  // 2^120: float32's exponent is biased by 120 more
}

// Where the scale, or the first pair, of a row lies.
__device__ __forceinline__ int64_t scale_at(const BlockAttention& op, bool key, int64_t block, int64_t slot,
                                            int64_t head) {
  if (op.format == PoolFormat::kFp8) return block * op.num_heads + head;
  if (key) return (block * op.num_heads + head) * op.head_dim * 2;
  return ((block * op.block_size + slot) * op.num_heads + head) * 2;
}

// Channels `first` to + 7, and those that are paired with them in the other half, rounded to T, of a row of
// whole pieces of 8 bytes.
template <typename T>
__device__ __forceinline__ void code_eights(const BlockAttention& op, bool key, int64_t block, int64_t slot,
                                            int64_t head, int first, uint4& low, uint4& high) {
  const Tokens& tokens = key ? op.k : op.v;
  const uint8_t* row = static_cast<const uint8_t*>(tokens.data) + block * tokens.stride_batch +
                       slot * tokens.stride_token + head * tokens.stride_head + first;
  const void* const scales = key ? op.k_scale : op.v_scale;
  const int64_t at = scale_at(op, key, block, slot, head);
  const auto half = static_cast<int>(op.head_dim) / 2;
  uint32_t found[2][4];
  if (op.format == PoolFormat::kFp8) {
    const float scale = static_cast<const float*>(scales)[at];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 words = widen_e4m3(__ldg(reinterpret_cast<const uint2*>(row + i * half)));
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 two = widen_pair(pairs[j], TypeTag<__half>{});
        found[i][j] = narrow_pair(two.x * scale, two.y * scale, TypeTag<T>{});
      }
    }
  } else {
    const uint2 codes = __ldg(reinterpret_cast<const uint2*>(row));
    const auto* pairs = static_cast<const uint32_t*>(scales) + at / 2;
    const float2 shared = widen_pair(__ldg(pairs), TypeTag<__half>{});  // a scale and a minimum, of values
    pairs += first / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t bytes = (j < 2 ? codes.x : codes.y) >> (j % 2 * 16 + i * 4);
        float2 scale = make_float2(shared.x, shared.x), least = make_float2(shared.y, shared.y);
        if (key) {
          scale = widen_pair(__ldg(pairs + i * half / 2 + j), TypeTag<__half>{});
          least = widen_pair(__ldg(pairs + half + i * half / 2 + j), TypeTag<__half>{});
        }
        found[i][j] = narrow_pair(fmaf(static_cast<float>(bytes & 15u), scale.x, least.x),
                                  fmaf(static_cast<float>(bytes >> 8 & 15u), scale.y, least.y), TypeTag<T>{});
      }
    }
  }
  low = make_uint4(found[0][0], found[0][1], found[0][2], found[0][3]);
  high = make_uint4(found[1][0], found[1][1], found[1][2], found[1][3]);
}

__device__ __forceinline__ float code_element(const BlockAttention& op, bool key, int64_t block, int64_t slot,
                                              int64_t head, int dim) {
  const Tokens& tokens = key ? op.k : op.v;
  const uint8_t* row = static_cast<const uint8_t*>(tokens.data) + block * tokens.stride_batch +
                       slot * tokens.stride_token + head * tokens.stride_head;
  const void* const scales = key ? op.k_scale : op.v_scale;
  const int64_t at = scale_at(op, key, block, slot, head);
  if (op.format == PoolFormat::kFp8)
    return from_e4m3(row[dim * tokens.stride_dim]) * static_cast<const float*>(scales)[at];
  const auto half = static_cast<int>(op.head_dim) / 2;
  const uint32_t byte = row[(dim < half ? dim : dim - half) * tokens.stride_dim];
  const __half* const scale = static_cast<const __half*>(scales) + at + (key ? dim : 0);
  return fmaf(static_cast<float>(dim < half ? byte & 15u : byte >> 4), __half2float(*scale),
              __half2float(scale[key ? op.head_dim : 1]));
}

}  // namespace livevlm
