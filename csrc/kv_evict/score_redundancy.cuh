// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of `score_redundancy`.
//
// The mean of a key's cosines to the recent frames is one dot product with the mean of their unit keys, the
// patch: computed once per slot, then every key and value is read once. kLanes threads share a token and go
// through its heads; kHeads heads are loaded before the first is used.
#pragma once

#include "kv_evict/recent_patches.cuh"

namespace livevlm {

inline constexpr int kHeads = 4;
inline constexpr int kTokensPerGroup = 2;  // one after another

// What a lane has of kHeads heads of a token: all loads are made before the first is used.
template <typename T, int kSize>
struct LoadedHeads {
  Vec<T, kSize> k[kHeads], v[kHeads];
  float patches[kHeads][kSize];

  // `patch`: of the first head, null if the token has no slot.
  __device__ __forceinline__ void load(const ScoreRedundancy& op, int64_t batch, int64_t token, int head,
                                       int dim, const float* patch) {
    const T* key = static_cast<const T*>(op.k.data) + batch * op.k.stride_batch + token * op.k.stride_token +
                   head * op.k.stride_head + dim * op.k.stride_dim;
    const T* value = static_cast<const T*>(op.v.data) + batch * op.v.stride_batch +
                     token * op.v.stride_token + head * op.v.stride_head + dim * op.v.stride_dim;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (head + i >= op.num_heads) break;
      k[i].load(key + i * op.k.stride_head);
      v[i].load(value + i * op.v.stride_head);
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) patches[i][j] = 0.0f;
      if (patch && head + i < op.num_heads) load_floats(patch + i * op.head_dim + dim, patches[i]);
    }
  }
};

// The sums that a token's scores are made of: key times patch, key times key, value times value.
struct HeadSums {
  float of[kHeads * 3] = {};

  template <typename T, int kSize>
  __device__ __forceinline__ void add(const LoadedHeads<T, kSize>& loaded, int heads) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (i >= heads) break;
      float x[kSize];
      loaded.k[i].widen(x);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        of[3 * i] += x[j] * loaded.patches[i][j];
        of[3 * i + 1] += x[j] * x[j];
      }
      loaded.v[i].widen(x);
#pragma unroll
      for (int j = 0; j < kSize; ++j) of[3 * i + 2] += x[j] * x[j];
    }
  }

  // Sums over the lanes of a group. Afterwards a quarter of the lanes has each head's three, in of[0..2]:
  // twice, lanes give half of what they have for the other half of what their partner has. That takes a third
  // of the shuffles of summing all twelve in all lanes.
  template <int kLanes>
  __device__ __forceinline__ void reduce(int lane) {
    static_assert(kHeads == 4 && kLanes >= 4, "two halvings");
    halve<6>(lane & kLanes / 2, kLanes / 2);
    halve<3>(lane & kLanes / 4, kLanes / 4);
#pragma unroll
    for (int step = kLanes / 8; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < 3; ++i) of[i] += __shfl_xor_sync(~0u, of[i], step);
    }
  }

 private:
  template <int kHalf>
  __device__ __forceinline__ void halve(bool upper, int step) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float give = upper ? of[i] : of[i + kHalf], keep = upper ? of[i + kHalf] : of[i];
      of[i] = keep + __shfl_xor_sync(~0u, give, step);
    }
  }
};

// Both scores of one token, by the lanes of a group. `valid`: it lies within its sequence; `inside`: within
// seq_len.
template <typename T, int kSize, int kLanes>
__device__ __forceinline__ void score_token(const RedundancyKernel& p, int64_t batch, int64_t token,
                                            int64_t slot, bool valid, bool inside) {
  const ScoreRedundancy& op = p.op;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, own_head = lane / (kLanes / kHeads);
  const int num_heads = static_cast<int>(op.num_heads), head_dim = static_cast<int>(op.head_dim);
  const bool has_slot = slot >= 0 && slot < op.tokens_per_frame;
  const float* patch =
      has_slot ? p.patches + (batch * op.tokens_per_frame + slot) * num_heads * head_dim : nullptr;
  float similarity = 0.0f, value_norm = 0.0f;  // sums over heads unless per_head

  for (int head = 0; head < num_heads; head += kHeads) {
    HeadSums sums;
    for (int dim = lane * kSize; valid && dim < head_dim; dim += kLanes * kSize) {
      LoadedHeads<T, kSize> loaded;
      loaded.load(op, batch, token, head, dim, has_slot ? patch + head * head_dim : nullptr);
      sums.add(loaded, num_heads - head);
    }
    sums.reduce<kLanes>(lane);
    const bool exists = head + own_head < num_heads;
    const float cosine = has_slot && exists ? sums.of[0] * inverse_norm(sums.of[1]) : 0.0f;
    const float norm = exists ? sqrtf(sums.of[2]) : 0.0f;
    if (!op.per_head) {
      similarity += cosine;
      value_norm += norm;
    } else if (exists && inside && lane % (kLanes / kHeads) == 0) {
      const int64_t at = (batch * num_heads + head + own_head) * op.seq_len + token;
      op.similarity[at] = cosine;
      op.value_norm[at] = norm;
    }
  }
  if (op.per_head) return;
#pragma unroll
  for (int step = kLanes / 2; step >= kLanes / kHeads; step /= 2) {
    similarity += __shfl_xor_sync(~0u, similarity, step);
    value_norm += __shfl_xor_sync(~0u, value_norm, step);
  }
  if (lane == 0 && inside) {
    op.similarity[batch * op.seq_len + token] = similarity / static_cast<float>(num_heads);
    op.value_norm[batch * op.seq_len + token] = value_norm / static_cast<float>(num_heads);
  }
}

// Tokens that one block scores.
template <int kLanes>
inline constexpr int64_t kTokensPerTile = int64_t{kGroups<kLanes>} * kTokensPerGroup;

template <typename T, int kSize, int kLanes>
__device__ __forceinline__ void score_tile(const RedundancyKernel& p, int64_t batch, int64_t tile) {
  const int64_t length = p.op.seq_lens ? min(int64_t{p.op.seq_lens[batch]}, p.op.seq_len) : p.op.seq_len;
  const int64_t first = tile * kTokensPerTile<kLanes> + threadIdx.x / kLanes;
  int32_t slots[kTokensPerGroup];  // ahead of all else: where a patch is depends on them
#pragma unroll
  for (int i = 0; i < kTokensPerGroup; ++i) {
    const int64_t token = first + i * kGroups<kLanes>;
    slots[i] = token < length ? p.op.slots[batch * p.op.seq_len + token] : -1;
  }
#pragma unroll
  for (int i = 0; i < kTokensPerGroup; ++i) {
    // Groups past the end go along: a warp's lanes meet in shuffles.
    const int64_t token = first + i * kGroups<kLanes>;
    score_token<T, kSize, kLanes>(p, batch, token, slots[i], token < length, token < p.op.seq_len);
  }
}

template <typename T, int kSize, int kLanes>
__global__ void __launch_bounds__(kRedundancyThreads, 4)
    score_redundancy_kernel(const __grid_constant__ RedundancyKernel p) {
  const auto tiles =
      static_cast<uint32_t>((p.op.seq_len + kTokensPerTile<kLanes> - 1) / kTokensPerTile<kLanes>);
  score_tile<T, kSize, kLanes>(p, blockIdx.x / tiles, blockIdx.x % tiles);
}

}  // namespace livevlm
