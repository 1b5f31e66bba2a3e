// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of `merge_states`.
//
// A thread owns one vector of one output row and reads it in every part that saw a key. The threads of a row
// compute its weights each for themselves: there are few parts, and their log-sum-exps come from L1.
#pragma once

#include <cfloat>

#include "block_attention/merge_states.h"
#include "common/cuda_vec.cuh"
#include "common/ptx.cuh"

namespace livevlm {

inline constexpr int kMergeThreads = 256;
inline constexpr int kPartsAtOnce = 4;  // whose loads are on their way together

// The log-sum-exps of parts first, first + 1, ...; those past the end saw no key.
__device__ __forceinline__ void load_lses(const MergeStates& p, const float* row, int64_t first,
                                          float (&lses)[kPartsAtOnce]) {
#pragma unroll
  for (int i = 0; i < kPartsAtOnce; ++i)
    lses[i] = first + i < p.num_parts ? row[(first + i) * p.lse_stride_part] : -INFINITY;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kMergeThreads) merge_states_kernel(const __grid_constant__ MergeStates p) {
  const int64_t index = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x, vectors = p.head_dim / kSize;
  const int64_t row = index / vectors, begin = (index - row * vectors) * kSize;
  const int64_t token = row / p.num_heads, head = row - token * p.num_heads;
  if (token >= p.total_q) return;

  const float* row_lses = p.lses + token * p.lse_stride_token + head * p.lse_stride_head;
  float lses[kPartsAtOnce], top = -FLT_MAX;  // not -inf: a row without any key would be -inf - -inf
  for (int64_t first = 0; first < p.num_parts; first += kPartsAtOnce) {
    load_lses(p, row_lses, first, lses);
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) top = max_or_nan(top, lses[i]);
  }

  const T* source = static_cast<const T*>(p.outs.data) + token * p.outs.stride_token +
                    head * p.outs.stride_head + begin * p.outs.stride_dim;
  float total = 0.0f, sums[kSize] = {};
  for (int64_t first = 0; first < p.num_parts; first += kPartsAtOnce) {
    if (p.num_parts > kPartsAtOnce) load_lses(p, row_lses, first, lses);
    Vec<T, kSize> loaded[kPartsAtOnce];  // zeros where a part saw no key: its output may be anything
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      if (lses[i] != -INFINITY) loaded[i].load(source + (first + i) * p.outs.stride_batch);
    }
#pragma unroll
    for (int i = 0; i < kPartsAtOnce; ++i) {
      const float weight = expf(lses[i] - top);
      total += weight;
      float values[kSize];
      loaded[i].widen(values);
#pragma unroll
      for (int j = 0; j < kSize; ++j) sums[j] += weight * values[j];
    }
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j) sums[j] = total == 0.0f ? 0.0f : sums[j] / total;
  store_as(static_cast<T*>(p.out) + row * p.head_dim + begin, sums);
  if (begin == 0) p.lse[row] = total == 0.0f ? -INFINITY : top + logf(total);
}

}  // namespace livevlm
