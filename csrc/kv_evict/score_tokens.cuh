// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of `score_tokens` share.
//
// A row is one query of one query head; the rows of all query heads of a KV head are scored together. The
// first pass takes each row's softmax apart by splits of the keys: the largest logit, and the sum of all
// relative to it. The second computes the logits again and, now that the whole sum is known, adds up what
// each key gets from all rows. Logits are in units of log 2.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/ptx.cuh"
#include "kv_evict/score_tokens.h"

namespace livevlm {

struct ScoreKernel {
  ScoreTokens op;
  float scale;         // sm_scale in units of log 2
  int32_t num_rows;    // num_queries * group_size
  int32_t block_rows;  // that fit into shared memory at a time
  int32_t num_splits, split_tokens;
  float2* partials;  // [batch, num_heads, num_splits, num_rows]: largest logit, sum
  float* scores;     // [batch, num_heads, seq_len]: sums over rows, already divided by their number
};

// Where a thread block works: one split of the keys of one KV head.
struct ScoreTask {
  int64_t batch_head, batch, head;
  int32_t split, length, first, end;  // tokens of the split that exist

  __device__ __forceinline__ explicit ScoreTask(const ScoreKernel& p) {
    const auto splits = static_cast<uint32_t>(p.num_splits), heads = static_cast<uint32_t>(p.op.num_heads);
    batch_head = blockIdx.x / splits;
    split = static_cast<int32_t>(blockIdx.x % splits);
    batch = static_cast<uint32_t>(batch_head) / heads;
    head = batch_head - batch * heads;
    const int64_t wanted = p.op.seq_lens ? p.op.seq_lens[batch] : p.op.seq_len;
    length = static_cast<int32_t>(max(int64_t{0}, min(wanted, p.op.seq_len)));
    first = split * p.split_tokens;
    end = min(first + p.split_tokens, length);
  }

  // Keys that a row sees: those before this one.
  __device__ __forceinline__ int32_t seen(const ScoreKernel& p, int32_t row) const {
    const auto queries = static_cast<int32_t>(p.op.num_queries);
    return p.op.causal ? length - queries + 1 + row % queries : length;
  }

  __device__ __forceinline__ float2* partials(const ScoreKernel& p) const {
    return p.partials + (batch_head * p.num_splits + split) * p.num_rows;
  }
};

// Row `row` is query row % num_queries of query head head * group_size + row / num_queries.
template <typename T>
__device__ __forceinline__ const T* query_of(const ScoreKernel& p, const ScoreTask& task, int32_t row) {
  const auto queries = static_cast<int32_t>(p.op.num_queries);
  return static_cast<const T*>(p.op.q.data) + task.batch * p.op.q.stride_batch +
         (row % queries) * p.op.q.stride_token +
         (task.head * p.op.group_size + row / queries) * p.op.q.stride_head;
}

template <typename T>
__device__ __forceinline__ const T* key_of(const ScoreKernel& p, const ScoreTask& task, int64_t token) {
  return static_cast<const T*>(p.op.k.data) + task.batch * p.op.k.stride_batch + token * p.op.k.stride_token +
         task.head * p.op.k.stride_head;
}

// A key's cosines, which its sines follow head_dim / 2 elements later.
__device__ __forceinline__ const float* angles_of(const ScoreKernel& p, const ScoreTask& task,
                                                  int64_t token) {
  const int64_t at = task.batch * p.op.seq_len + token;
  int64_t position = p.op.positions_int64 ? static_cast<const int64_t*>(p.op.positions)[at]
                                          : static_cast<const int32_t*>(p.op.positions)[at];
  position = max(int64_t{0}, min(position, p.op.max_position - 1));
  return p.op.cos_sin_cache + position * p.op.head_dim;
}

// A running softmax sum is relative to a top that may lag behind the largest logit: it is raised only when a
// sum outgrows this. Before the first key it is below every logit, and a sum relative to it outgrows at once.
inline constexpr float kOutgrown = 1e12f, kNoTop = -1e30f;

__device__ __forceinline__ float2 merged(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  return {top, a.y * exp2_approx(a.x - top) + b.y * exp2_approx(b.x - top)};
}

// log2 of a row's whole sum; infinite if it sees no key, so that its share of every key is zero.
__device__ __forceinline__ float log_sum(const ScoreKernel& p, const ScoreTask& task, int32_t row) {
  constexpr int kAhead = 8;
  const float2* partials = p.partials + task.batch_head * p.num_splits * p.num_rows + row;
  float2 all = {kNoTop, 0.0f};
  for (int first = 0; first < p.num_splits; first += kAhead) {
    float2 loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      loaded[i] = {kNoTop, 0.0f};
      if (first + i < p.num_splits) loaded[i] = __ldcg(&partials[int64_t{first + i} * p.num_rows]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) all = merged(all, loaded[i]);
  }
  return all.y > 0.0f ? all.x + log2f(all.y) : INFINITY;
}

// Means over heads and, for a shared score, over layers: in a fixed order.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) average_scores_kernel(const __grid_constant__ ScoreKernel p) {
  const int64_t out = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (out >= p.op.batch / p.op.num_shared * p.op.seq_len) return;
  const int64_t unit = out / p.op.seq_len, token = out - unit * p.op.seq_len;
  const float* source = p.scores + unit * p.op.num_shared * p.op.num_heads * p.op.seq_len + token;
  float sum = 0.0f;
  for (int64_t i = 0; i < p.op.num_shared * p.op.num_heads; ++i) sum += source[i * p.op.seq_len];
  p.op.out[out] = sum / static_cast<float>(p.op.num_shared * p.op.num_heads);
}

}  // namespace livevlm
