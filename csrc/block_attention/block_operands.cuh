// SPDX-License-Identifier: Apache-2.0
// Summaries and queries as operands of tensor core products.
//
// As in score_keys.cuh a thread reads 8 elements of a row at once, and uses them in two products. float32
// summaries are split into two bfloat16, so that 16 bits of their mantissa count: bfloat16 alone would not
// tell blocks of similar score apart.
#pragma once

#include <type_traits>

#include "block_attention/block_shares.cuh"

namespace livevlm {

// T: of queries and products. K: of summaries.
template <typename T, typename K, int kDim, bool kMinMax>
struct ShareShape {
  static constexpr int kLength = kDim * (kMinMax ? 2 : 1), kPieces = kLength / 32;
  static constexpr int kParts = std::is_same_v<T, K> ? 1 : 2;           // that a summary is the sum of
  static constexpr int kTiles = kLength <= 128 && kParts == 1 ? 2 : 1;  // of 16 summaries, that a warp has
  static constexpr int kKeys = 2 * kTiles;                              // of which each thread sees
  static constexpr int kWarpKeys = 16 * kTiles;
  // Padded, so that eight threads read from different banks.
  static constexpr int kRowBytes = kLength * 2 + 64;
};

// A thread's summaries lane / 4 + 8 * i of the warp's, as they are loaded: in pieces of 8 elements, 32 apart.
template <typename Shape, typename K, int kDim>
struct LoadedSummaries {
  static constexpr int kWords = int{sizeof(K)} / 2;  // of 16 bytes in 8 elements
  uint4 words[Shape::kKeys][Shape::kPieces][kWords];

  // Summaries past the end become zeros; what is there is not read.
  __device__ __forceinline__ void load(const RetrieveKernel& p, const ShareTask& task, int32_t first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < Shape::kKeys; ++i) {
      const int32_t block = first + i * 8 + lane / 4;
      const K* key = static_cast<const K*>(p.op.keys.data) + task.key_offset(p, block) + lane % 4 * 8;
#pragma unroll
      for (int piece = 0; piece < Shape::kPieces; ++piece) {
        const K* source = key + piece * 32 % kDim + (piece * 32 >= kDim ? p.op.upper : 0);
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          words[i][piece][w] = make_uint4(0, 0, 0, 0);
          if (block < task.end) words[i][piece][w] = load_once(reinterpret_cast<const uint4*>(source) + w);
        }
      }
    }
  }
};

// The larger part of two float32 as a pair of T, and what is left of them.
template <typename T>
__device__ __forceinline__ uint2 split_pair(uint32_t x, uint32_t y) {
  const float2 whole = {__uint_as_float(x), __uint_as_float(y)};
  const uint32_t large = narrow_pair(whole.x, whole.y, TypeTag<T>{});
  const float2 rounded = widen_pair(large, TypeTag<T>{});
  // Nothing is left of an infinite one; inf - inf would be NaN.
  const float2 rest = {fabsf(rounded.x) == INFINITY ? 0.0f : whole.x - rounded.x,
                       fabsf(rounded.y) == INFINITY ? 0.0f : whole.y - rounded.y};
  return {large, narrow_pair(rest.x, rest.y, TypeTag<T>{})};
}

// What one instruction takes lies in neighbouring registers.
template <typename Shape, typename T>
struct SummaryOperands {
  uint32_t of[Shape::kParts][Shape::kPieces][2][Shape::kTiles][4];

  template <typename Loaded>
  __device__ __forceinline__ void take(const Loaded& loaded) {
#pragma unroll
    for (int piece = 0; piece < Shape::kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < Shape::kKeys; ++i) {  // keys of the upper and lower half of a tile take turns
        const uint4 words = loaded.words[i][piece][0];
        uint32_t pairs[Shape::kParts][4] = {{words.x, words.y, words.z, words.w}};
        if constexpr (Shape::kParts == 2) {
          const uint4 others = loaded.words[i][piece][1];
          const uint2 split[4] = {split_pair<T>(words.x, words.y), split_pair<T>(words.z, words.w),
                                  split_pair<T>(others.x, others.y), split_pair<T>(others.z, others.w)};
#pragma unroll
          for (int j = 0; j < 4; ++j) pairs[0][j] = split[j].x, pairs[1][j] = split[j].y;
        }
#pragma unroll
        for (int part = 0; part < Shape::kParts; ++part) {
          uint32_t (&first)[4] = of[part][piece][0][i / 2], (&second)[4] = of[part][piece][1][i / 2];
          first[i % 2] = pairs[part][0], first[i % 2 + 2] = pairs[part][1];
          second[i % 2] = pairs[part][2], second[i % 2 + 2] = pairs[part][3];
        }
      }
    }
  }
};

// Writes rows [first, first + count) of the queries to shared memory, in the background; rows past the last
// one repeat it. For bounds, a row is the parts that go with the lower and with the upper ones.
template <typename Shape, typename T, int kDim, bool kMinMax, int kThreads>
__device__ __forceinline__ void load_queries(const RetrieveKernel& p, const ShareTask& task, int32_t first,
                                             int32_t count, char* rows) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count * (kDim / 8); i += kThreads) {
    const int row = i / (kDim / 8), piece = i % (kDim / 8);
    const T* query = static_cast<const T*>(p.op.q.data) +
                     task.query_offset(p, min(first + row, p.num_rows - 1)) + piece * 8;
    char* target = rows + row * Shape::kRowBytes + piece * 16;
    if constexpr (!kMinMax) {
      cp_async16(target, query, true);
    } else {
      Vec<T, 8> loaded;
      loaded.load(query);
      float values[8], lows[8], highs[8];
      loaded.widen(values);
#pragma unroll
      for (int j = 0; j < 8; ++j) lows[j] = part_for_low(values[j]), highs[j] = part_for_high(values[j]);
      store_as(reinterpret_cast<T*>(target), lows);
      store_as(reinterpret_cast<T*>(target + kDim * 2), highs);
    }
  }
  cp_async_commit();
}

}  // namespace livevlm
