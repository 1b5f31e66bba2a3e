// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of `score_redundancy`.
//
// The mean of a key's cosines to the recent frames is one dot product with the mean of their unit keys, the
// patch: computed once per slot, then every key and value is read once. The patch of a single frame is that
// frame's key, divided by its length where it is used.
//
// kLanes threads share a token and go through its heads, kHeads at a time. Then they go on to the token a
// frame behind it: slots mostly repeat from frame to frame, so that the patch is in L1.
#pragma once

#include <type_traits>

#include "common/cuda_launch.cuh"
#include "kv_evict/recent_patches.cuh"

namespace livevlm {

inline constexpr int kHeads = 2;
inline constexpr int kTokensPerGroup = 2;

// What a lane has of kHeads heads of a token: all loads are made before the first is used.
template <typename T, int kSize, bool kSingle>
struct LoadedHeads {
  using Element = std::conditional_t<kSingle, T, float>;  // of patches
  Vec<T, kSize> k[kHeads], v[kHeads];
  Patch<Element, kSize> patches[kHeads];

  __device__ __forceinline__ void load(const RedundancyKernel& p, int64_t batch, int64_t token, int64_t slot,
                                       bool has_slot, int head, int dim) {
    const auto at = [=](const Tokens& tokens, int64_t row, auto type) {
      return static_cast<const typename decltype(type)::type*>(tokens.data) + batch * tokens.stride_batch +
             row * tokens.stride_token + head * tokens.stride_head + dim * tokens.stride_dim;
    };
    const ScoreRedundancy& op = p.op;
    const T *key = at(op.k, token, TypeTag<T>{}), *value = at(op.v, token, TypeTag<T>{});
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (head + i >= op.num_heads) break;
      k[i].load(key + i * op.k.stride_head);
      v[i].load(value + i * op.v.stride_head);
    }
    const Element* patch = at(p.patches, has_slot ? slot : 0, TypeTag<Element>{});
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      patches[i] = {};
      if (has_slot && head + i < op.num_heads) patches[i].load(patch + i * p.patches.stride_head);
    }
  }
};

// The sums that a token's scores are made of: key times patch, key times key, value times value, and for a
// single recent frame its key times itself.
template <bool kSingle>
struct HeadSums {
  static constexpr int kSums = kSingle ? 4 : 3;
  float of[kHeads * kSums] = {};

  template <typename T, int kSize>
  __device__ __forceinline__ void add(const LoadedHeads<T, kSize, kSingle>& loaded, int heads) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (i >= heads) break;
      float x[kSize], patch[kSize], *sums = of + kSums * i;
      loaded.k[i].widen(x);
      loaded.patches[i].widen(patch);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        sums[0] += x[j] * patch[j];
        sums[1] += x[j] * x[j];
        if (kSingle) sums[kSums - 1] += patch[j] * patch[j];
      }
      loaded.v[i].widen(x);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sums[2] += x[j] * x[j];
    }
  }

  // Sums over the lanes of a group. Afterwards each half of the lanes has one head's, in of[0, kSums): first
  // lanes give the half that they don't keep for what their partner has of the other, which takes fewer
  // shuffles than summing all of it in all lanes.
  template <int kLanes>
  __device__ __forceinline__ void reduce(int lane) {
    static_assert(kHeads == 2, "one halving");
    const bool upper = lane & kLanes / 2;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float give = upper ? of[i] : of[i + kSums], keep = upper ? of[i + kSums] : of[i];
      of[i] = keep + __shfl_xor_sync(~0u, give, kLanes / 2);
    }
#pragma unroll
    for (int step = kLanes / 4; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) of[i] += __shfl_xor_sync(~0u, of[i], step);
    }
  }

  // Of the head whose sums this lane has.
  __device__ __forceinline__ float cosine() const {
    const float dot = kSingle ? of[0] * inverse_norm(of[kSums - 1]) : of[0];
    return dot * inverse_norm(of[1]);
  }
  __device__ __forceinline__ float value_norm() const { return sqrtf(of[2]); }

  // Whether a square is beyond float32, which makes a length infinite: then the product may be beyond it too,
  // and cosine() NaN. A patch of several frames is no longer than 1.
  __device__ __forceinline__ bool overflowed() const {
    return kSingle && fmaxf(of[1], of[kSums - 1]) == INFINITY;
  }
};

// Both scores of one token, by the lanes of a group. `valid`: it lies within its sequence; `inside`: within
// seq_len.
template <typename T, int kSize, int kLanes, bool kSingle>
__device__ __forceinline__ void score_token(const RedundancyKernel& p, int64_t batch, int64_t token,
                                            int64_t slot, bool valid, bool inside) {
  const ScoreRedundancy& op = p.op;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, own_head = lane / (kLanes / kHeads);
  const int num_heads = static_cast<int>(op.num_heads), head_dim = static_cast<int>(op.head_dim);
  const bool has_slot = slot >= 0 && slot < op.tokens_per_frame;
  float similarity = 0.0f, value_norm = 0.0f;  // sums over heads unless per_head

  for (int head = 0; head < num_heads; head += kHeads) {
    HeadSums<kSingle> sums;
    for (int dim = lane * kSize; valid && dim < head_dim; dim += kLanes * kSize) {
      LoadedHeads<T, kSize, kSingle> loaded;
      loaded.load(p, batch, token, slot, has_slot, head, dim);
      sums.add(loaded, num_heads - head);
    }
    sums.template reduce<kLanes>(lane);
    const bool exists = head + own_head < num_heads;
    float cosine = has_slot && exists ? sums.cosine() : 0.0f;
    if (has_slot && exists && sums.overflowed())
      cosine = cosine_of_long<T>(op, batch, token, slot, head + own_head);
    const float norm = exists ? sums.value_norm() : 0.0f;
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
  similarity += __shfl_xor_sync(~0u, similarity, kLanes / kHeads);
  value_norm += __shfl_xor_sync(~0u, value_norm, kLanes / kHeads);
  if (lane == 0 && inside) {
    op.similarity[batch * op.seq_len + token] = similarity / static_cast<float>(num_heads);
    op.value_norm[batch * op.seq_len + token] = value_norm / static_cast<float>(num_heads);
  }
}

// Tiles of a sequence: each is kGroups tokens next to each other, and those `pitch` and its multiples behind.
template <int kLanes>
struct Tiles {
  uint32_t parts, count;  // parts of `pitch` tokens

  __host__ __device__ Tiles(int64_t seq_len, uint32_t pitch)
      : parts((pitch + kGroups<kLanes> - 1) / kGroups<kLanes>) {
    const int64_t stretch = int64_t{pitch} * kTokensPerGroup;
    count = static_cast<uint32_t>((seq_len + stretch - 1) / stretch) * parts;
  }
};

template <typename T, int kSize, int kLanes, bool kSingle>
__global__ void __launch_bounds__(kRedundancyThreads, 6)
    score_redundancy_kernel(const __grid_constant__ RedundancyKernel p) {
  let_next_kernel_start();
  const ScoreRedundancy& op = p.op;
  const Tiles<kLanes> tiles(op.seq_len, p.pitch);
  // From the last tokens to the first, all layers together: eviction moves the first tokens first, and finds
  // them in L2.
  const auto layers = static_cast<uint32_t>(op.batch);
  const uint32_t batch = blockIdx.x % layers, tile = tiles.count - 1 - blockIdx.x / layers;
  const int64_t length = op.seq_lens ? min(int64_t{op.seq_lens[batch]}, op.seq_len) : op.seq_len;
  const uint32_t part = tile % tiles.parts * kGroups<kLanes> + threadIdx.x / kLanes;
  const int64_t first = int64_t{tile / tiles.parts} * kTokensPerGroup * p.pitch + part;
  const int32_t* slots = op.slots + batch * op.seq_len;
  const auto slot_of = [&](int64_t token) { return part < p.pitch && token < length ? slots[token] : -1; };
  int32_t slot = slot_of(first);
  wait_for_previous_kernels();
#pragma unroll 1
  for (int i = 0; i < kTokensPerGroup; ++i) {
    // Groups without a token go along: a warp's lanes meet in shuffles.
    const int64_t token = part < p.pitch ? first + i * int64_t{p.pitch} : op.seq_len;
    // Ahead: where the next patch is depends on it.
    const int32_t next_slot = i + 1 < kTokensPerGroup ? slot_of(token + p.pitch) : -1;
    score_token<T, kSize, kLanes, kSingle>(p, batch, token, slot, token < length, token < op.seq_len);
    slot = next_slot;
  }
}

}  // namespace livevlm
