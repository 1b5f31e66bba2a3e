// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of `score_novelty`.
//
// kLanes threads share kCompared tokens next to each other and go through their heads: each row is read once,
// past L1, and compared with the mean of its slot and an earlier token, which come from L2 or nearer. The
// blocks of a processor go through a sequence's heads at about the same pace, and one head of all its means
// is small enough for L1.
#pragma once

#include "common/cuda_launch.cuh"
#include "kv_evict/recent_patches.cuh"
#include "kv_evict/score_novelty.h"

namespace livevlm {

inline constexpr int kNoveltyThreads = 128;
inline constexpr int kCompared = 2;  // tokens that a group of lanes compares at once

template <int kLanes>
inline constexpr int kNoveltyTile = kNoveltyThreads / kLanes * kCompared;  // tokens of a block

// A token, and what it is compared with; -1 for what there is not.
struct Comparison {
  int64_t token;
  int32_t slot = -1, previous = -1;

  __device__ __forceinline__ void find(const ScoreNovelty& op, int64_t batch, int64_t length,
                                       int64_t at_token) {
    token = at_token;
    if (token >= length) return;
    const int64_t at = batch * op.seq_len + token;
    const int32_t given_slot = op.slots[at], given_previous = op.previous[at];
    if (given_slot >= 0 && given_slot < op.tokens_per_frame) slot = given_slot;
    if (given_previous >= 0 && given_previous < length) previous = given_previous;
  }
};

template <typename T>
__device__ __forceinline__ const T* row_of(const Tokens& rows, int64_t batch, int64_t row) {
  const int64_t safe = row < 0 ? 0 : row;  // not read
  return static_cast<const T*>(rows.data) + batch * rows.stride_batch + safe * rows.stride_token;
}

template <typename T, int kSize, int kLanes>
__global__ void __launch_bounds__(kNoveltyThreads, 8)
    score_novelty_kernel(const __grid_constant__ ScoreNovelty op) {
  const auto tiles = static_cast<uint32_t>((op.seq_len + kNoveltyTile<kLanes> - 1) / kNoveltyTile<kLanes>);
  const int64_t batch = blockIdx.x / tiles;
  const int64_t length = op.seq_lens ? min(int64_t{op.seq_lens[batch]}, op.seq_len) : op.seq_len;
  const int64_t first = int64_t{blockIdx.x % tiles} * kNoveltyTile<kLanes> + threadIdx.x / kLanes * kCompared;

  Comparison tokens[kCompared];
  const T *own_row[kCompared], *previous_row[kCompared];
  const float* usual_row[kCompared];
#pragma unroll
  for (int i = 0; i < kCompared; ++i) {
    tokens[i].find(op, batch, length, first + i);
    own_row[i] = row_of<T>(op.x, batch, tokens[i].token);
    previous_row[i] = row_of<T>(op.x, batch, tokens[i].previous);
    usual_row[i] = row_of<float>(op.usual, batch, tokens[i].slot);
  }
  float change[kCompared] = {}, step[kCompared] = {};
  const uint32_t lane = threadIdx.x % kLanes, of_head = static_cast<uint32_t>(op.head_dim) / kSize;
  const uint32_t pieces = static_cast<uint32_t>(op.num_heads) * of_head;
#pragma unroll 1
  for (uint32_t piece = lane; piece < pieces; piece += kLanes) {
    const int64_t head = piece / of_head, dim = piece % of_head * kSize;
    const int64_t in_x = head * op.x.stride_head + dim * op.x.stride_dim;
    const int64_t in_usual = head * op.usual.stride_head + dim * op.usual.stride_dim;
    Vec<T, kSize> own[kCompared], previous[kCompared];
    Patch<float, kSize> usual[kCompared];
#pragma unroll
    for (int i = 0; i < kCompared; ++i) {  // all loads before the first is used
      if (tokens[i].slot >= 0 || tokens[i].previous >= 0) own[i].load(own_row[i] + in_x);
      if (tokens[i].slot >= 0) usual[i].load(usual_row[i] + in_usual);
      if (tokens[i].previous >= 0) previous[i].load(previous_row[i] + in_x);
    }
#pragma unroll
    for (int i = 0; i < kCompared; ++i) {
      float x[kSize], other[kSize];
      own[i].widen(x);
      usual[i].widen(other);
#pragma unroll
      for (int j = 0; j < kSize; ++j) change[i] += (x[j] - other[j]) * (x[j] - other[j]);
      previous[i].widen(other);
#pragma unroll
      for (int j = 0; j < kSize; ++j) step[i] += (x[j] - other[j]) * (x[j] - other[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kCompared; ++i) {
    change[i] = sqrtf(sum_of_lanes<kLanes>(change[i]));
    step[i] = sqrtf(sum_of_lanes<kLanes>(step[i]));
    const int64_t token = tokens[i].token;
    if (lane != 0 || token >= op.seq_len) continue;
    const float none = token < length ? INFINITY : 0.0f;
    op.change[batch * op.seq_len + token] = tokens[i].slot >= 0 ? change[i] : none;
    op.step[batch * op.seq_len + token] = tokens[i].previous >= 0 ? step[i] : none;
  }
}

}  // namespace livevlm
