// SPDX-License-Identifier: Apache-2.0
// The patches of `score_redundancy`: the mean of the recent frames' unit keys, for each slot and head.
//
// kLanes threads share a key. A lane has one vector of it; longer keys are gone through piece by piece.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/ptx.cuh"
#include "kv_evict/score_redundancy.h"

namespace livevlm {

inline constexpr int kRedundancyThreads = 128;

template <int kLanes>
inline constexpr int kGroups = kRedundancyThreads / kLanes;  // of lanes in a block

struct RedundancyKernel {
  ScoreRedundancy op;
  Tokens patches;   // [batch, tokens_per_frame, num_heads, head_dim], float32; or a single frame's keys
  float one_frame;  // 1 / num_frames
  uint32_t pitch;   // tokens from one of a group of lanes to its next
};

template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step, kLanes);
  return value;
}

__device__ __forceinline__ float inverse_norm(float squares) {
  return squares == 0.0f ? 1.0f : rsqrtf(squares);
}

// The cosine of two keys of which one has an infinite length: 0, or NaN if an element is not finite.
template <typename T>
__device__ __forceinline__ float cosine_of_long(const ScoreRedundancy& op, int64_t batch, int64_t token,
                                                int64_t slot, int64_t head) {
  float sum = 0.0f;
  const auto add = [&](const Tokens& tokens, int64_t row) {
    const T* key = static_cast<const T*>(tokens.data) + batch * tokens.stride_batch +
                   row * tokens.stride_token + head * tokens.stride_head;
#pragma unroll 1  // seldom gone through
    for (int64_t dim = 0; dim < op.head_dim; ++dim)
      sum += 0.0f * static_cast<float>(key[dim * tokens.stride_dim]);
  };
  add(op.k, token);
  add(op.recent_k, slot);
  return sum;
}

template <int kLanes>
__host__ __device__ inline int64_t patch_tiles(const ScoreRedundancy& op) {
  return (op.tokens_per_frame * op.num_heads + kGroups<kLanes> - 1) / kGroups<kLanes>;
}

// kSize elements of a patch: float32, or of a single frame's key. Through L1, where other tokens of the slot
// find them; not through the read-only path, since patches are still being written when their reader starts.
template <typename T, int kSize>
struct Patch {
  static constexpr int kPart = kSize == 1 ? 1 : kVectorSize<T>;
  Vec<T, kPart> parts[kSize / kPart];

  __device__ __forceinline__ void load(const T* source) {
#pragma unroll
    for (int i = 0; i < kSize / kPart; ++i) {
      if constexpr (kPart == 1) {
        parts[i].load(source);
      } else {
        parts[i].words = reinterpret_cast<const uint4*>(source)[i];
      }
    }
  }

  __device__ __forceinline__ void widen(float (&values)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize / kPart; ++i) {
      float part[kPart];
      parts[i].widen(part);
#pragma unroll
      for (int j = 0; j < kPart; ++j) values[i * kPart + j] = part[j];
    }
  }
};

// The patches of kGroups slots and heads of one sequence, from `tile` * kGroups on; heads are next to each
// other.
template <typename T, int kSize, int kLanes>
__device__ __forceinline__ void make_patches(const RedundancyKernel& p, int64_t batch, int64_t tile) {
  const ScoreRedundancy& op = p.op;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const auto heads = static_cast<uint32_t>(op.num_heads);
  const auto place = static_cast<uint32_t>(tile * kGroups<kLanes> + threadIdx.x / kLanes);
  const bool inside = place < op.tokens_per_frame * heads;
  const uint32_t slot = inside ? place / heads : 0, head = inside ? place % heads : 0;
  const T* of_head = static_cast<const T*>(op.recent_k.data) + batch * op.recent_k.stride_batch +
                     slot * op.recent_k.stride_token + head * op.recent_k.stride_head;
  float* patch = static_cast<float*>(p.patches.data) + batch * p.patches.stride_batch + place * op.head_dim;
  constexpr int kStep = kLanes * kSize, kFrames = 4;
  const int head_dim = static_cast<int>(op.head_dim), num_frames = static_cast<int>(op.num_frames);

  // One piece of the row at a time: kSize elements a lane. Almost always the only one.
  for (int piece = 0; piece < head_dim; piece += kStep) {
    const int dim = piece + lane * kSize;
    float sums[kSize] = {};
    for (int first = 0; first < num_frames; first += kFrames) {
      Vec<T, kSize> loaded[kFrames];
#pragma unroll
      for (int i = 0; i < kFrames; ++i) {
        const bool wanted = first + i < num_frames && dim < head_dim;
        if (wanted)
          loaded[i].load(of_head + int64_t{first + i} * op.stride_frame + dim * op.recent_k.stride_dim);
      }
#pragma unroll
      for (int i = 0; i < kFrames; ++i) {
        if (first + i >= num_frames) break;
        float values[kSize], squares = 0.0f;
        loaded[i].widen(values);
#pragma unroll
        for (int j = 0; j < kSize; ++j) squares += values[j] * values[j];
        for (int other = lane * kSize; head_dim > kStep && other < head_dim; other += kStep) {
          if (other == dim) continue;
          float rest[kSize];
          Vec<T, kSize> more;
          more.load(of_head + int64_t{first + i} * op.stride_frame + other * op.recent_k.stride_dim);
          more.widen(rest);
#pragma unroll
          for (int j = 0; j < kSize; ++j) squares += rest[j] * rest[j];
        }
        const float inverse = inverse_norm(sum_of_lanes<kLanes>(squares));
#pragma unroll
        for (int j = 0; j < kSize; ++j) sums[j] += values[j] * inverse;
      }
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) sums[j] *= p.one_frame;
    if (inside && dim < head_dim) store(patch + dim, sums);
  }
}

template <typename T, int kSize, int kLanes>
__global__ void __launch_bounds__(kRedundancyThreads, 4)
    make_patches_kernel(const __grid_constant__ RedundancyKernel p) {
  let_next_kernel_start();
  const auto tiles = static_cast<uint32_t>(patch_tiles<kLanes>(p.op));
  make_patches<T, kSize, kLanes>(p, blockIdx.x / tiles, blockIdx.x % tiles);
}

}  // namespace livevlm
