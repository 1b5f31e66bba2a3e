// SPDX-License-Identifier: Apache-2.0
// Attention shares of blocks on tensor cores, for 16-bit queries in rows that can be read 16 bytes at a time.
//
// A warp holds 16 or 32 summaries in registers and goes through the rows of queries, which lie in shared
// memory. Of a short sequence several warps hold the same summaries and share the rows, so that all of the
// GPU is busy.
#pragma once

#include "block_attention/block_operands.cuh"

namespace livevlm {

inline constexpr int kShareThreads = 256, kShareWarps = kShareThreads / 32;
inline constexpr int kShareRows = 16;  // at once

// Logits of the warp's summaries and kShareRows rows, the first of which is at `rows`.
template <typename Shape, typename T>
__device__ __forceinline__ void multiply(const SummaryOperands<Shape, T>& keys, const char* rows,
                                         Logits<2, Shape::kKeys>& block) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const char* own = rows + lane / 4 * Shape::kRowBytes + lane % 4 * 16;
#pragma unroll
  for (int piece = 0; piece < Shape::kPieces; ++piece) {
    uint4 row[2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
      row[n] = *reinterpret_cast<const uint4*>(own + n * 8 * Shape::kRowBytes + piece * 64);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t b[2] = {half ? row[n].z : row[n].x, half ? row[n].w : row[n].y};
#pragma unroll
        for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
          for (int m = 0; m < Shape::kTiles; ++m)
            mma_m16n8k16(block.of[n][m], keys.of[part][piece][half][m], b, TypeTag<T>{});
        }
      }
    }
  }
}

// Hides summaries from `left` on.
template <int kKeys>
__device__ __forceinline__ void hide_from(int32_t left, Logits<2, kKeys>& block) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 4 * kKeys; ++i) {
    const int n = i / (2 * kKeys), m = i / 4 % (kKeys / 2), j = i % 4;
    if (m * 16 + j / 2 * 8 + lane / 4 >= left) block.of[n][m][j] = -INFINITY;
  }
}

// Adds up what the warps with the same summaries have, in a fixed order, and writes it.
template <int kKeys>
__device__ __forceinline__ void write_shares(const RetrieveKernel& p, const ShareTask& task, int32_t first,
                                             bool first_rows, float (&shares)[kKeys], float* exchange) {
  constexpr int kWarpKeys = 8 * kKeys;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {  // the lanes of a summary each have some rows
    shares[i] += __shfl_xor_sync(~0u, shares[i], 1);
    shares[i] += __shfl_xor_sync(~0u, shares[i], 2);
    if (lane % 4 == 0) exchange[thread / 32 * kWarpKeys + i * 8 + lane / 4] = shares[i];
  }
  __syncthreads();
  const int tile = p.key_warps * kWarpKeys;
  if (thread < tile && first + thread < task.end) {
    float sum = 0.0f;
    for (int i = thread; i < kShareWarps * kWarpKeys; i += tile) sum += exchange[i];
    float* share = p.parts + task.batch_head * p.part_count + first + thread;
    *share = first_rows ? sum : *share + sum;
  }
  __syncthreads();
}

// Shared memory: rows, then in the first pass tops and sums of each summary warp, in the second the
// logarithms of the rows' sums and shares to exchange.
template <typename T, typename K, int kDim, bool kMinMax, bool kSecond>
__global__ void __launch_bounds__(kShareThreads, 1)
    share_mma_kernel(const __grid_constant__ RetrieveKernel p) {
  using Shape = ShareShape<T, K, kDim, kMinMax>;
  LIVEVLM_DYNAMIC_SHARED(char, memory);
  const ShareTask task(p);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int key_warp = warp % p.key_warps, row_warp = warp / p.key_warps;
  const int32_t row_step = kShareWarps / p.key_warps * kShareRows, tile = p.key_warps * Shape::kWarpKeys;
  float* const vectors = reinterpret_cast<float*>(memory + p.block_rows * Shape::kRowBytes);
  float* const exchange = vectors + p.block_rows;
  float* const tops = vectors + key_warp * 2 * p.block_rows;
  float* const sums = tops + p.block_rows;
  let_next_kernel_start();

  for (int32_t first_row = 0; first_row < p.num_rows; first_row += p.block_rows) {
    const int32_t num_rows = min(p.num_rows - first_row, p.block_rows);
    const int32_t padded = (num_rows + kShareRows - 1) / kShareRows * kShareRows;
    __syncthreads();  // the rows before are done with
    load_queries<Shape, T, kDim, kMinMax, kShareThreads>(p, task, first_row, padded, memory);
    LoadedSummaries<Shape, K, kDim> next;
    next.load(p, task, task.first + key_warp * Shape::kWarpKeys);
    if constexpr (kSecond) {
      if (first_row == 0) wait_for_previous_kernels();
      for (int i = thread; i < padded; i += kShareThreads)
        vectors[i] = i < num_rows ? log_share_sum(p, task, first_row + i) : INFINITY;
    } else {
      for (int i = thread; i < 2 * p.key_warps * p.block_rows; i += kShareThreads)
        vectors[i] = i / p.block_rows % 2 == 0 ? kNoTop : 0.0f;
    }
    cp_async_wait<0>();
    __syncthreads();

    for (int32_t begin = task.first; begin < task.end; begin += tile) {
      const int32_t own = begin + key_warp * Shape::kWarpKeys;
      SummaryOperands<Shape, T> keys;
      keys.take(next);
      next.load(p, task, own + tile);
      float shares[Shape::kKeys] = {};
      if (own < task.end) {
#pragma unroll 1
        for (int32_t row = row_warp * kShareRows; row < padded; row += row_step) {
          Logits<2, Shape::kKeys> block{};
          multiply(keys, memory + row * Shape::kRowBytes, block);
          if constexpr (kSecond) {
            add_shares(block, vectors + row, p.scale, shares);
          } else {
            if (own + Shape::kWarpKeys > task.end) hide_from(task.end - own, block);
            add_to_sums(block, tops + row, sums + row, p.scale);
          }
        }
      }
      if constexpr (kSecond) write_shares(p, task, begin, first_row == 0, shares, exchange);
    }
    if constexpr (!kSecond) {
      __syncthreads();
      for (int i = thread; i < num_rows; i += kShareThreads) {
        float2 all = {kNoTop, 0.0f};
        for (int w = 0; w < p.key_warps; ++w) {
          const float* of = vectors + w * 2 * p.block_rows + i;
          all = merged(all, {of[0], of[p.block_rows]});
        }
        task.partials(p)[first_row + i] = all;
      }
    }
  }
}

}  // namespace livevlm
