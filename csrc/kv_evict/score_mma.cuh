// SPDX-License-Identifier: Apache-2.0
// `score_tokens` on tensor cores, for 16-bit floats in rows that can be read 16 bytes at a time.
//
// A warp holds kWarpTokens keys in registers, rotated if RoPE is wanted, and goes through the rows of
// queries, which lie in shared memory: logits come out with keys down and rows across. In the second pass
// each thread then adds up its own keys, in registers, whatever the row. The next keys are loaded meanwhile.
#pragma once

#include "kv_evict/score_keys.cuh"
#include "kv_evict/score_sums.cuh"

namespace livevlm {

inline constexpr int kScoreThreads = 256, kScoreWarps = kScoreThreads / 32;
inline constexpr int kWarpTokens = 32, kTileTokens = kScoreWarps * kWarpTokens;
using MmaLogits = Logits<2, 4>;
inline constexpr int kRowsAtOnce = MmaLogits::kRows;
inline constexpr int kRowPadding = 64;  // bytes, so that eight threads read from different banks

template <int kDim>
inline constexpr int kRowBytes = kDim * 2 + kRowPadding;

// Logits of the warp's keys and kRowsAtOnce rows, the first of which is at `rows`: [rows / 8][keys /
// 16][fragment].
template <typename T, int kDim>
__device__ __forceinline__ void multiply(const KeyOperands<T, kDim, 4>& keys, const char* rows,
                                         MmaLogits& block) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const char* own = rows + lane / 4 * kRowBytes<kDim> + lane % 4 * 16;
#pragma unroll
  for (int part = 0; part < kDim / 32; ++part) {
    uint4 row[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      row[n] = *reinterpret_cast<const uint4*>(own + n * 8 * kRowBytes<kDim> + part * 64);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t b[2] = {half ? row[n].z : row[n].x, half ? row[n].w : row[n].y};
#pragma unroll
        for (int m = 0; m < 2; ++m)
          mma_m16n8k16(block.of[n][m], keys.operands[part][half][m], b, TypeTag<T>{});
      }
    }
  }
}

template <typename T, int kDim, bool kSecond>
__global__ void __launch_bounds__(kScoreThreads, 1) score_mma_kernel(const __grid_constant__ ScoreKernel p) {
  LIVEVLM_DYNAMIC_SHARED(char, memory);
  const ScoreTask task(p);
  let_next_kernel_start();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  float* const vectors = reinterpret_cast<float*>(memory + p.block_rows * kRowBytes<kDim>);
  float* const tops = vectors + warp * 2 * p.block_rows;  // first pass: each warp has its own running sums
  float* const sums = tops + p.block_rows;
  const bool rope = p.op.positions != nullptr;

  for (int32_t first_row = 0; first_row < p.num_rows; first_row += p.block_rows) {
    const int32_t num_rows = min(p.num_rows - first_row, p.block_rows);
    const int32_t padded = (num_rows + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce;
    __syncthreads();  // the rows before are done with
    for (int i = thread; i < padded * (kDim / 8); i += kScoreThreads) {
      const int row = i / (kDim / 8), piece = i % (kDim / 8);
      const T* query = query_of<T>(p, task, first_row + (row < num_rows ? row : 0));
      cp_async16(memory + row * kRowBytes<kDim> + piece * 16, query + piece * 8, row < num_rows);
    }
    cp_async_commit();
    if constexpr (kSecond) {
      if (first_row == 0) wait_for_previous_kernels();
    }
    for (int i = thread; i < padded; i += kScoreThreads) {
      if constexpr (kSecond) {
        vectors[i] = i < num_rows ? log_sum(p, task, first_row + i) : INFINITY;
      } else {
        for (int w = 0; w < kScoreWarps; ++w) {
          vectors[w * 2 * p.block_rows + i] = kNoTop;
          vectors[(w * 2 + 1) * p.block_rows + i] = 0.0f;
        }
      }
    }
    int32_t token = task.first + warp * kWarpTokens;
    KeyOperands<T, kDim, 4> keys;
    LoadedKeys<T, kDim, 4> next;
    next.load(p, task, token);
    cp_async_wait<0>();
    __syncthreads();

    for (; token < task.end; token += kTileTokens) {
      if (rope) next.rotate(p, task, token);
      keys.take(next);
      next.load(p, task, token + kTileTokens);
      const bool masked = token + kWarpTokens > seen_by_all(p, task);
      float shares[4] = {};
#pragma unroll 1
      for (int32_t row = 0; row < padded; row += kRowsAtOnce) {
        MmaLogits block{};
        multiply(keys, memory + row * kRowBytes<kDim>, block);
        if (masked) block.mask(p, task, token, first_row + row);
        if constexpr (kSecond) {
          add_shares(block, vectors + row, p.scale, shares);
        } else {
          add_to_sums(block, tops + row, sums + row, p.scale);
        }
      }
      if constexpr (kSecond) write_shares(p, task, token, first_row == 0, shares);
    }
    if constexpr (!kSecond) {
      __syncthreads();
      for (int i = thread; i < num_rows; i += kScoreThreads) {
        float2 all = {kNoTop, 0.0f};
        for (int w = 0; w < kScoreWarps; ++w) {
          const float* of = vectors + w * 2 * p.block_rows + i;
          all = merged(all, {of[0], of[p.block_rows]});
        }
        task.partials(p)[first_row + i] = all;
      }
    }
  }
  if constexpr (kSecond) clear_past_end(p, task);
}

}  // namespace livevlm
