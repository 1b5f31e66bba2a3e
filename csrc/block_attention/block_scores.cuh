// SPDX-License-Identifier: Apache-2.0
// Scores of blocks for the mean of a question's queries.
//
// The score is linear in the queries (in their negative and positive parts, for bounds), so the query heads
// of a group are added up first, and each summary is read once and multiplied once. Bound by reading the
// summaries, which are loaded before the queries are ready.
#pragma once

#include "block_attention/retrieve_blocks.cuh"

namespace livevlm {

inline constexpr int kMeanThreads = 256, kMeanWarps = kMeanThreads / 32;

// Mean over the queries: of one query head and 32 dimensions.
template <typename T>
__global__ void __launch_bounds__(kMeanThreads) mean_query_kernel(const __grid_constant__ RetrieveKernel p) {
  __shared__ float sums[kMeanWarps][32];
  let_next_kernel_start();
  const RetrieveBlocks& op = p.op;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto pieces = static_cast<uint32_t>((op.head_dim + 31) / 32);
  const auto num_heads = static_cast<uint32_t>(op.num_heads * op.group_size);
  const uint32_t unit = blockIdx.x / pieces, batch = unit / num_heads, head = unit % num_heads;
  const int64_t dim = int64_t{blockIdx.x % pieces} * 32 + lane;
  float sum = 0.0f;
  if (dim < op.head_dim) {
    const T* q = static_cast<const T*>(op.q.data) + batch * op.q.stride_batch + head * op.q.stride_head +
                 dim * op.q.stride_dim;
    sum = sum_of(warp, kMeanWarps, op.num_queries,
                 [&](int64_t i) { return static_cast<float>(q[i * op.q.stride_token]); });
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || dim >= op.head_dim) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kMeanWarps; ++i) total += sums[i][lane];
  p.means[int64_t{unit} * op.head_dim + dim] = total / static_cast<float>(op.num_queries);
}

inline constexpr int kScoreBlocksThreads = 256, kScoreBlocksWarps = kScoreBlocksThreads / 32;

// Adds up the queries of each of `heads` KV heads: weights[head][low, high][dim]. A thread has two at a time.
template <typename Q, bool kMinMax>
__device__ __forceinline__ void add_queries(const RetrieveKernel& p, int64_t batch, int64_t first_head,
                                            int heads, float* weights) {
  constexpr int kElements = 2, kAhead = 8;  // loads of each that are on their way
  const auto head_dim = static_cast<int>(p.op.head_dim), group = static_cast<int>(p.op.group_size);
  for (int begin = static_cast<int>(threadIdx.x); begin < heads * head_dim;
       begin += kElements * kScoreBlocksThreads) {
    const Q* q[kElements];
    float low[kElements] = {}, high[kElements] = {};
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int i = min(begin + e * kScoreBlocksThreads, heads * head_dim - 1), head = i / head_dim;
      q[e] = static_cast<const Q*>(p.query.data) + batch * p.query.stride_batch +
             (first_head + head) * group * p.query.stride_head + (i - head * head_dim) * p.query.stride_dim;
    }
    for (int first = 0; first < group; first += kAhead) {
      float loaded[kElements][kAhead];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
#pragma unroll
        for (int g = 0; g < kAhead; ++g) {
          loaded[e][g] = 0.0f;
          if (first + g < group) loaded[e][g] = static_cast<float>(q[e][(first + g) * p.query.stride_head]);
        }
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
#pragma unroll
        for (int g = 0; g < kAhead; ++g) {
          low[e] += kMinMax ? part_for_low(loaded[e][g]) : loaded[e][g];
          if constexpr (kMinMax) high[e] += part_for_high(loaded[e][g]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int i = begin + e * kScoreBlocksThreads, head = i / head_dim;
      if (i >= heads * head_dim) break;
      float* target = weights + head * head_dim * (kMinMax ? 2 : 1) + (i - head * head_dim);
      target[0] = low[e];
      if constexpr (kMinMax) target[head_dim] = high[e];
    }
  }
}

// A warp has kBlocks blocks, its lanes the vectors of their rows: a row is all that makes one score, of one
// head or of all. Every block's sum is taken in the same order: equal summaries have equal scores.
template <typename T, int kSize, int kBlocks, bool kMinMax>
__global__ void __launch_bounds__(kScoreBlocksThreads, 2)
    score_blocks_kernel(const __grid_constant__ RetrieveKernel p) {
  LIVEVLM_DYNAMIC_SHARED(float, weights);
  constexpr int kAhead = kBlocks == 1 ? 4 : 2;
  const RetrieveBlocks& op = p.op;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  let_next_kernel_start();
  const int64_t row = blockIdx.x / static_cast<uint32_t>(p.row_tiles);
  const auto tile = static_cast<int32_t>(blockIdx.x % static_cast<uint32_t>(p.row_tiles));
  const int64_t batch = batch_of(op, row);
  const int64_t own_head = op.per_head ? row - batch * op.num_heads : 0;
  const int32_t first = (tile * kScoreBlocksWarps + warp) * kBlocks;
  const int32_t count = max(0, min(kBlocks, valid_blocks(op, batch) - first));
  const T* keys = static_cast<const T*>(op.keys.data) + batch * op.keys.stride_batch +
                  int64_t{first} * op.keys.stride_token;
  const auto head_vectors = static_cast<uint32_t>(op.head_dim) / kSize;

  Vec<T, kSize> loaded[kAhead][kBlocks];
  float sums[kBlocks] = {};
  for (int32_t done = 0; done < p.row_heads; done += p.chunk_heads) {
    const int32_t heads = min(p.chunk_heads, p.row_heads - done);
    const uint32_t vectors = static_cast<uint32_t>(heads) * head_vectors * (kMinMax ? 2 : 1);
    for (uint32_t begin = 0; begin < vectors; begin += 32 * kAhead) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const uint32_t vector = begin + static_cast<uint32_t>(a * 32 + lane), half = vector / head_vectors;
        const uint32_t within = vector - half * head_vectors, head = kMinMax ? half / 2 : half;
        const T* source = keys + (own_head + done + head) * op.keys.stride_head +
                          (kMinMax && half % 2 != 0 ? op.upper : 0) +
                          int64_t{within * kSize} * op.keys.stride_dim;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if (vector < vectors && b < count) loaded[a][b].load(source + b * op.keys.stride_token);
        }
      }
      if (begin == 0) {  // now that summaries are on their way
        if (done == 0) {
          wait_for_previous_kernels();  // for the mean of the queries
        } else {
          __syncthreads();
        }
        switch (p.query_dtype) {
          case DType::kFloat32:
            add_queries<float, kMinMax>(p, batch, own_head + done, heads, weights);
            break;
          case DType::kFloat16:
            add_queries<__half, kMinMax>(p, batch, own_head + done, heads, weights);
            break;
          case DType::kBFloat16:
            add_queries<__nv_bfloat16, kMinMax>(p, batch, own_head + done, heads, weights);
            break;
        }
        __syncthreads();
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const uint32_t vector = begin + static_cast<uint32_t>(a * 32 + lane);
        if (vector >= vectors) break;
        float weight[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) weight[i] = weights[vector * kSize + static_cast<uint32_t>(i)];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          float values[kSize];
          loaded[a][b].widen(values);
#pragma unroll
          for (int i = 0; i < kSize; ++i) sums[b] += weight[i] * values[i];
        }
      }
    }
  }
  float* scores = p.scores + row * p.num_blocks + first;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sums[b] += __shfl_xor_sync(~0u, sums[b], step);
    if (lane == b && b < count) scores[b] = sums[b];
  }
}

}  // namespace livevlm
