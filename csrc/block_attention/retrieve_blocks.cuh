// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of `retrieve_blocks` share.
//
// Scores go to scratch memory, then one thread block or one cluster a row finds the best (top_blocks.cuh).
// How they are made:
//   pooling "query"    block_scores.cuh: one dot product of a summary and a sum of queries
//   pooling "softmax"  block_shares_mma.cuh, block_shares_fma.cuh: two passes over the logits
//   kind "mass"        score_tokens, whose scores are added up by block (top_blocks.cuh)
// A kernel is launched while the one before it runs, and does what it can ahead of the other's results: with
// rows this short, most of the time would go to launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "block_attention/retrieve_blocks.h"
#include "common/cuda_vec.cuh"
#include "common/ptx.cuh"

namespace livevlm {

struct RetrieveKernel {
  RetrieveBlocks op;
  int32_t num_blocks;  // that a sequence has room for

  // Pooling "query".
  Tokens query;  // one a sequence: the only one, or the mean of all
  DType query_dtype;
  float* means;         // [batch, num_heads * group_size, head_dim]: where `query` is, if it is a mean
  int32_t row_heads;    // heads that make one score: all, or one if per_head
  int32_t chunk_heads;  // of these at a time: as many as shared memory has room for
  int32_t row_tiles;    // thread blocks of a row of scores

  // Pooling "softmax".
  float scale;         // sm_scale in units of log 2
  int32_t num_rows;    // num_queries * group_size
  int32_t block_rows;  // that fit into shared memory at a time
  int32_t key_warps;   // warps that have different summaries; others share theirs and have different rows
  int32_t num_splits, split_blocks;
  float2* partials;  // [batch, num_heads, num_splits, num_rows]: largest logit, sum

  // Scores that are still to be added up, of heads or of the tokens of a block: [batch, num_heads,
  // part_count].
  float* parts;
  int64_t part_count;

  // [batch (, num_heads if per_head), added_heads, num_blocks]; `added_heads` are added up where they are
  // read.
  float* scores;
  int32_t added_heads;
  int32_t cluster_size;  // thread blocks that find the best of a row of many blocks
};

__device__ __forceinline__ int64_t valid_entries(const RetrieveBlocks& op, int64_t batch) {
  const int64_t wanted = op.seq_lens ? op.seq_lens[batch] : op.num_entries;
  return max(int64_t{0}, min(wanted, op.num_entries));
}

__device__ __forceinline__ int32_t valid_blocks(const RetrieveBlocks& op, int64_t batch) {
  const int64_t entries = valid_entries(op, batch);
  if (op.block_size == 1) return static_cast<int32_t>(entries);  // no division
  return static_cast<int32_t>(entries / op.block_size + (entries % op.block_size != 0 ? 1 : 0));
}

// The sequence that a row of scores belongs to.
__device__ __forceinline__ int64_t batch_of(const RetrieveBlocks& op, int64_t row) {
  return op.per_head ? static_cast<uint32_t>(row) / static_cast<uint32_t>(op.num_heads) : row;
}

// Sum of at(i) for i = first, first + step, ... below `end`. Eight are loaded at a time: a loop that is
// unrolled by the compiler waits for each of the last few, which here may be all.
template <typename At>
__device__ __forceinline__ float sum_of(int64_t first, int64_t step, int64_t end, At at) {
  constexpr int kAhead = 8;
  float sum = 0.0f;
  for (; first < end; first += kAhead * step) {
    float loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) loaded[i] = first + i * step < end ? at(first + i * step) : 0.0f;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum += loaded[i];
  }
  return sum;
}

// Quest's bound is the sum over dimensions of max(q * low, q * high): that is q * high where q is positive
// and q * low where it is negative. So a query counts as two vectors, and a bound is a dot product of twice
// the length.
__device__ __forceinline__ float part_for_low(float q) {
  return min_or_nan(q, 0.0f);
}
__device__ __forceinline__ float part_for_high(float q) {
  return max_or_nan(q, 0.0f);
}

}  // namespace livevlm
