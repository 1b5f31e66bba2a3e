// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of `summarize_blocks`.
//
// A thread owns one vector of one output row and reads that vector of every token in the block. Threads next
// to each other own neighbouring vectors, so a warp reads whole lines; no two threads share work, so sums
// keep token order and the result does not depend on the launch. The kernel only moves bytes: what counts is
// kInFlight loads per thread.
#pragma once

#include "block_attention/summarize_blocks.h"
#include "common/cuda_vec.cuh"
#include "common/ptx.cuh"

namespace livevlm {

inline constexpr int kSummarizeThreads = 128;
inline constexpr int kInFlight = 16;

template <bool kMinMax, int kSize>
struct BlockSummary {
  float low[kSize], high[kSize];  // for the mean, `low` is the sum and `high` unused

  __device__ __forceinline__ BlockSummary() {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      low[i] = kMinMax ? __int_as_float(0x7f800000) : 0.0f;  // infinity
      high[i] = -low[i];
    }
  }

  __device__ __forceinline__ void add(const float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kMinMax) {
        low[i] = min_or_nan(low[i], values[i]);
        high[i] = max_or_nan(high[i], values[i]);
      } else {
        low[i] += values[i];
      }
    }
  }

  __device__ __forceinline__ void write(float* out, int64_t row, int64_t count) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kMinMax) {
        low[i] = count > 0 ? low[i] : 0.0f;
        high[i] = count > 0 ? high[i] : 0.0f;
      } else {
        low[i] = count > 0 ? low[i] / static_cast<float>(count) : 0.0f;
      }
    }
    store(out, low);
    if constexpr (kMinMax) store(out + row, high);
  }
};

// Grid: x over blocks (threadIdx.y within), y over sequences, z over vectors of a row (threadIdx.x within).
template <typename T, int kSize, bool kMinMax>
__global__ void __launch_bounds__(kSummarizeThreads)
    summarize_blocks_kernel(const __grid_constant__ SummarizeBlocks p) {
  const int64_t block = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (block >= p.num_blocks) return;
  const int64_t begin = block * p.block_size;
  const int64_t row = p.num_heads * p.head_dim;

  for (int64_t batch = blockIdx.y; batch < p.batch; batch += gridDim.y) {
    // A block that ends before the first change keeps its summary.
    if (p.first_token && p.first_token[batch] - begin >= p.block_size) continue;
    const int64_t length = p.seq_lens ? min(int64_t{p.seq_lens[batch]}, p.seq_len) : p.seq_len;
    const int64_t count = max(min(length - begin, p.block_size), int64_t{0});
    const T* tokens = static_cast<const T*>(p.k) + batch * p.stride_batch + begin * p.stride_token;
    float* out = p.out + (batch * p.num_blocks + block) * row * (kMinMax ? 2 : 1);

    for (int64_t column = (int64_t{blockIdx.z} * blockDim.x + threadIdx.x) * kSize; column < row;
         column += int64_t{gridDim.z} * blockDim.x * kSize) {
      const int64_t head = column / p.head_dim;
      const T* source = tokens + head * p.stride_head + (column - head * p.head_dim) * p.stride_dim;
      BlockSummary<kMinMax, kSize> summary;
      Vec<T, kSize> loaded[kInFlight];
      float values[kSize];

      int64_t token = 0;
      for (; token + kInFlight <= count; token += kInFlight) {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) loaded[i].load(source + i * p.stride_token);
        source += kInFlight * p.stride_token;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          loaded[i].widen(values);
          summary.add(values);
        }
      }
      // Slots past the end may hold anything, NaN included: they are not read.
      if (token < count) {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (token + i < count) loaded[i].load(source + i * p.stride_token);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (token + i >= count) break;
          loaded[i].widen(values);
          summary.add(values);
        }
      }
      summary.write(out + column, row, count);
    }
  }
}

}  // namespace livevlm
