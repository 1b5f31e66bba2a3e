// SPDX-License-Identifier: Apache-2.0
// Attention shares of blocks, each of which counts as one key: what both versions of the kernels have in
// common.
//
// As in score_tokens a row is one query of one query head, and logits are computed twice: for the sum of each
// row's exponentials, by splits of the blocks, and once that is known, for what each block gets from all
// rows. Logits are in units of log 2.
#pragma once

#include "block_attention/retrieve_blocks.cuh"
#include "kv_evict/score_sums.cuh"

namespace livevlm {

// Where a thread block works: one split of one KV head.
struct ShareTask {
  int64_t batch_head, batch, head;
  int32_t split, first, end;  // summaries that exist

  __device__ __forceinline__ explicit ShareTask(const RetrieveKernel& p) {
    const auto splits = static_cast<uint32_t>(p.num_splits), heads = static_cast<uint32_t>(p.op.num_heads);
    batch_head = blockIdx.x / splits;
    split = static_cast<int32_t>(blockIdx.x % splits);
    batch = static_cast<uint32_t>(batch_head) / heads;
    head = batch_head - batch * heads;
    first = split * p.split_blocks;
    end = static_cast<int32_t>(min(int64_t{first} + p.split_blocks, int64_t{valid_blocks(p.op, batch)}));
  }

  __device__ __forceinline__ float2* partials(const RetrieveKernel& p) const {
    return p.partials + (batch_head * p.num_splits + split) * p.num_rows;
  }

  // Elements from the start of the queries to row `row`: query row % num_queries of a query head.
  __device__ __forceinline__ int64_t query_offset(const RetrieveKernel& p, int32_t row) const {
    const auto queries = static_cast<int32_t>(p.op.num_queries);
    return batch * p.op.q.stride_batch + (row % queries) * p.op.q.stride_token +
           (head * p.op.group_size + row / queries) * p.op.q.stride_head;
  }

  // The same for a summary, or a lower bound.
  __device__ __forceinline__ int64_t key_offset(const RetrieveKernel& p, int32_t block) const {
    return batch * p.op.keys.stride_batch + block * p.op.keys.stride_token + head * p.op.keys.stride_head;
  }
};

// log2 of a row's whole sum. NaN if the softmax is: if a logit is NaN or infinite, or all are -inf.
__device__ __forceinline__ float log_share_sum(const RetrieveKernel& p, const ShareTask& task, int32_t row) {
  constexpr int kAhead = 16;
  const float2* partials = p.partials + task.batch_head * p.num_splits * p.num_rows + row;
  float2 all = {kNoTop, 0.0f};
  for (int first = 0; first < p.num_splits; first += kAhead) {
    float2 loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      loaded[i] = {kNoTop, 0.0f};
      if (first + i < p.num_splits) loaded[i] = partials[int64_t{first + i} * p.num_rows];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) all = merged(all, loaded[i]);
  }
  return all.y > 0.0f ? all.x + log2f(all.y) : NAN;
}

}  // namespace livevlm
