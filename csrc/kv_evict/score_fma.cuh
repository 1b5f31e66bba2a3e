// SPDX-License-Identifier: Apache-2.0
// `score_tokens` for any dtype, head_dim and stride, in float32.
//
// A block holds 32 keys in shared memory, one a lane. A warp takes four rows at a time and computes their
// logits with all 32 keys.
#pragma once

#include "kv_evict/score_sums.cuh"

namespace livevlm {

inline constexpr int kFmaScoreThreads = 256, kFmaScoreWarps = kFmaScoreThreads / 32;
inline constexpr int kFmaTokens = 32, kFmaRows = 4;  // of a block; of a warp at a time

// Shared memory in floats: keys [head_dim][32 + 1], rows of each warp [head_dim][4], sums of each row [2],
// shares.
inline int64_t score_fma_floats(int64_t head_dim, int64_t block_rows) {
  return head_dim * (kFmaTokens + 1) + kFmaScoreWarps * head_dim * kFmaRows + 2 * block_rows +
         kFmaScoreThreads;
}

template <typename T>
__device__ __forceinline__ void load_keys(const ScoreKernel& p, const ScoreTask& task, int32_t first,
                                          float* keys) {
  const auto head_dim = static_cast<int>(p.op.head_dim), half = head_dim / 2;
  for (int i = static_cast<int>(threadIdx.x); i < kFmaTokens * head_dim; i += kFmaScoreThreads) {
    const int within = i / head_dim, dim = i % head_dim;
    const int32_t token = first + within;
    float value = 0.0f;
    if (token < task.end) {
      const T* key = key_of<T>(p, task, token);
      value = static_cast<float>(key[dim * p.op.k.stride_dim]);
      if (p.op.positions) {
        const float* angles = angles_of(p, task, token);
        const int pair = dim < half ? dim + half : dim - half, angle = dim < half ? dim : dim - half;
        const float other = static_cast<float>(key[pair * p.op.k.stride_dim]);
        value = value * angles[angle] + (dim < half ? -other : other) * angles[half + angle];
      }
    }
    keys[dim * (kFmaTokens + 1) + within] = value;
  }
}

template <typename T, bool kSecond>
__global__ void __launch_bounds__(kFmaScoreThreads) score_fma_kernel(const __grid_constant__ ScoreKernel p) {
  LIVEVLM_DYNAMIC_SHARED(float, memory);
  const ScoreTask task(p);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const auto head_dim = static_cast<int>(p.op.head_dim);
  float* const rows = memory + warp * head_dim * kFmaRows;  // first: they are read 16 bytes at a time
  float* const keys = memory + kFmaScoreWarps * head_dim * kFmaRows;
  float* const tops = keys + head_dim * (kFmaTokens + 1);  // or logarithms of sums, in the second pass
  float* const sums = tops + p.block_rows;
  float* const shares = sums + p.block_rows;

  for (int32_t first_row = 0; first_row < p.num_rows; first_row += p.block_rows) {
    const int32_t num_rows = min(p.num_rows - first_row, p.block_rows);
    __syncthreads();
    for (int i = thread; i < num_rows; i += kFmaScoreThreads) {
      tops[i] = kSecond ? log_sum(p, task, first_row + i) : kNoTop;
      sums[i] = 0.0f;
    }
    for (int32_t token = task.first; token < task.end; token += kFmaTokens) {
      __syncthreads();
      load_keys<T>(p, task, token, keys);
      __syncthreads();
      float share = 0.0f;
      for (int32_t row = warp * kFmaRows; row < num_rows; row += kFmaScoreWarps * kFmaRows) {
        for (int i = lane; i < head_dim * kFmaRows; i += 32) {
          const int32_t own = row + i % kFmaRows;
          const bool exists = own < num_rows;
          const T* query = query_of<T>(p, task, first_row + (exists ? own : 0));
          rows[i] = exists ? static_cast<float>(query[i / kFmaRows * p.op.q.stride_dim]) : 0.0f;
        }
        __syncwarp();
        float logits[kFmaRows] = {};
        for (int dim = 0; dim < head_dim; ++dim) {
          const float key = keys[dim * (kFmaTokens + 1) + lane];
          const float4 four = *reinterpret_cast<const float4*>(rows + dim * kFmaRows);
          logits[0] += key * four.x, logits[1] += key * four.y;
          logits[2] += key * four.z, logits[3] += key * four.w;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kFmaRows; ++i) {
          const int32_t own = row + i;
          if (own >= num_rows) break;
          const bool hidden = token + lane >= min(task.end, task.seen(p, first_row + own));
          const float logit = hidden ? -INFINITY : logits[i] * p.scale;
          if constexpr (kSecond) {
            share += exp2_approx(logit - tops[own]);
            continue;
          }
          float top = logit;
#pragma unroll
          for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
          float sum = top == -INFINITY ? 0.0f : exp2_approx(logit - top);
#pragma unroll
          for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
          if (lane == 0 && top > kNoTop) {
            const float2 all = merged({tops[own], sums[own]}, {top, sum});
            tops[own] = all.x, sums[own] = all.y;
          }
        }
      }
      if constexpr (kSecond) {
        shares[thread] = share;
        __syncthreads();
        if (warp == 0 && token + lane < task.end) {
          float total = 0.0f;
          for (int w = 0; w < kFmaScoreWarps; ++w) total += shares[w * 32 + lane];
          float* score = p.scores + task.batch_head * p.op.seq_len + token + lane;
          total /= static_cast<float>(p.num_rows);
          *score = first_row == 0 ? total : *score + total;
        }
      }
    }
    if constexpr (!kSecond) {
      __syncthreads();
      for (int i = thread; i < num_rows; i += kFmaScoreThreads) {
        task.partials(p)[first_row + i] = {tops[i], sums[i]};
      }
    }
  }
  if constexpr (kSecond) clear_past_end(p, task);
}

}  // namespace livevlm
