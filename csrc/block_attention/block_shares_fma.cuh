// SPDX-License-Identifier: Apache-2.0
// Attention shares of blocks for any dtypes, head_dim and strides, in float32.
//
// A thread block holds 32 summaries in shared memory, one a lane. A warp takes four rows at a time and
// computes their logits with all 32.
#pragma once

#include "block_attention/block_shares.cuh"

namespace livevlm {

inline constexpr int kFmaShareThreads = 256, kFmaShareWarps = kFmaShareThreads / 32;
inline constexpr int kFmaSummaries = 32, kFmaShareRows = 4;  // of a block; of a warp at a time

// Shared memory in floats: rows of each warp [length][4], summaries [length][32 + 1], sums of each row [2],
// shares. A summary is `length` elements, twice head_dim for bounds.
inline int64_t share_fma_floats(int64_t length, int64_t block_rows) {
  return kFmaShareWarps * length * kFmaShareRows + length * (kFmaSummaries + 1) + 2 * block_rows +
         kFmaShareThreads;
}

__device__ __forceinline__ float element_of(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(data)[at]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

__device__ __forceinline__ void load_summaries(const RetrieveKernel& p, const ShareTask& task, int32_t first,
                                               int length, float* keys) {
  const auto head_dim = static_cast<int>(p.op.head_dim);
  for (int i = static_cast<int>(threadIdx.x); i < kFmaSummaries * length; i += kFmaShareThreads) {
    const int within = i / length, element = i % length;
    const int32_t block = first + within;
    float value = 0.0f;
    if (block < task.end) {
      const int64_t at = element < head_dim ? element * p.op.keys.stride_dim
                                            : (element - head_dim) * p.op.keys.stride_dim + p.op.upper;
      value = element_of(p.op.keys.data, p.op.keys_dtype, task.key_offset(p, block) + at);
    }
    keys[element * (kFmaSummaries + 1) + within] = value;
  }
}

// Four rows of a warp; those past the last one repeat it.
__device__ __forceinline__ void load_rows(const RetrieveKernel& p, const ShareTask& task, int32_t first,
                                          int length, float* rows) {
  const auto head_dim = static_cast<int>(p.op.head_dim);
  for (int i = static_cast<int>(threadIdx.x) % 32; i < length * kFmaShareRows; i += 32) {
    const int element = i / kFmaShareRows, dim = element < head_dim ? element : element - head_dim;
    const int64_t at = task.query_offset(p, min(first + i % kFmaShareRows, p.num_rows - 1));
    const float value = element_of(p.op.q.data, p.op.q_dtype, at + dim * p.op.q.stride_dim);
    rows[i] = p.op.kind != BlockScore::kMinMax ? value
              : element < head_dim             ? part_for_low(value)
                                               : part_for_high(value);
  }
}

template <bool kSecond>
__global__ void __launch_bounds__(kFmaShareThreads, 2)
    share_fma_kernel(const __grid_constant__ RetrieveKernel p) {
  LIVEVLM_DYNAMIC_SHARED(float, memory);
  const ShareTask task(p);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const auto length = static_cast<int>(p.op.head_dim) * (p.op.kind == BlockScore::kMinMax ? 2 : 1);
  float* const rows = memory + warp * length * kFmaShareRows;  // first: they are read 16 bytes at a time
  float* const keys = memory + kFmaShareWarps * length * kFmaShareRows;
  float* const tops = keys + length * (kFmaSummaries + 1);  // or logarithms of sums, in the second pass
  float* const sums = tops + p.block_rows;
  float* const shares = sums + p.block_rows;
  let_next_kernel_start();
  if constexpr (kSecond) wait_for_previous_kernels();

  for (int32_t first_row = 0; first_row < p.num_rows; first_row += p.block_rows) {
    const int32_t end_row = min(p.num_rows, first_row + p.block_rows);
    __syncthreads();
    for (int i = thread; i < end_row - first_row; i += kFmaShareThreads) {
      tops[i] = kSecond ? log_share_sum(p, task, first_row + i) : kNoTop;
      sums[i] = 0.0f;
    }
    for (int32_t block = task.first; block < task.end; block += kFmaSummaries) {
      __syncthreads();
      load_summaries(p, task, block, length, keys);
      __syncthreads();
      const bool hidden = block + lane >= task.end;
      float share = 0.0f;
      for (int32_t row = first_row + warp * kFmaShareRows; row < end_row;
           row += kFmaShareWarps * kFmaShareRows) {
        load_rows(p, task, row, length, rows);
        __syncwarp();
        float logits[kFmaShareRows] = {};
        for (int i = 0; i < length; ++i) {
          const float key = keys[i * (kFmaSummaries + 1) + lane];
          const float4 four = *reinterpret_cast<const float4*>(rows + i * kFmaShareRows);
          logits[0] += key * four.x, logits[1] += key * four.y;
          logits[2] += key * four.z, logits[3] += key * four.w;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kFmaShareRows; ++i) {
          const int32_t own = row + i - first_row;
          if (row + i >= end_row) break;
          const float logit = hidden ? -INFINITY : logits[i] * p.scale;
          if constexpr (kSecond) {
            share += exp2_approx(logit - tops[own]);
            continue;
          }
          float top = fmaxf(logit, kNoTop);  // the number, if one is NaN: its exponential is NaN then
#pragma unroll
          for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
          float sum = exp2_approx(logit - top);
#pragma unroll
          for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
          if (lane == 0) {
            const float2 all = merged({tops[own], sums[own]}, {top, sum});
            tops[own] = all.x, sums[own] = all.y;
          }
        }
      }
      if constexpr (kSecond) {
        shares[thread] = share;
        __syncthreads();
        if (warp == 0 && !hidden) {
          float total = 0.0f;
          for (int w = 0; w < kFmaShareWarps; ++w) total += shares[w * 32 + lane];
          float* target = p.parts + task.batch_head * p.part_count + block + lane;
          *target = first_row == 0 ? total : *target + total;
        }
      }
    }
    if constexpr (!kSecond) {
      __syncthreads();
      for (int i = thread; i < end_row - first_row; i += kFmaShareThreads)
        task.partials(p)[first_row + i] = {tops[i], sums[i]};
    }
  }
}

}  // namespace livevlm
