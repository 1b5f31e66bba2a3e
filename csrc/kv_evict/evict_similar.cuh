// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of `evict_similar` between scoring and moving: the choice of tokens.
//
// A unit keeps the same tokens: a layer, a head of it, or all layers of a stream that share a keep-set. One
// thread block chooses for a unit.
#pragma once

#include "kv_evict/evict_similar.h"
#include "kv_evict/top_tokens.cuh"

namespace livevlm {

struct EvictKernel {
  // Scores of units of several layers are in the place of the first layer's.
  EvictSimilar op;
  float* inverses;   // [batch], only if num_shared > 1: one over a layer's mean norm
  uint32_t* chosen;  // [units, words]: flags
  int64_t words;
  uint32_t* moving_scratch;  // to be zeroed
  int64_t moving_words;
};

// Value norms grow with depth: each layer's are divided by their mean, or the last layers alone would decide.
__global__ void __launch_bounds__(kRowThreads, 1) layer_means_kernel(const __grid_constant__ EvictKernel p) {
  __shared__ float of_warps[kRowWarps];
  const int64_t length = p.op.scoring.seq_len;
  const float* norm = p.op.scoring.value_norm + blockIdx.x * length;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t token = threadIdx.x; token < length; token += kRowThreads) sum += __ldg(norm + token);
  const auto sum_of_warp = [](float value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
  };
  sum = sum_of_warp(sum);
  if (row_lane() == 0) of_warps[row_warp()] = sum;
  __syncthreads();
  if (row_warp() > 0) return;
  const float mean = sum_of_warp(of_warps[row_lane()]) / static_cast<float>(length);
  if (row_lane() == 0) p.inverses[blockIdx.x] = 1.0f / (mean == 0.0f ? 1.0f : mean);
}

inline constexpr int kAverageThreads = 256;

// Averages both scores over the layers of a unit.
__global__ void __launch_bounds__(kAverageThreads)
    average_layers_kernel(const __grid_constant__ EvictKernel p) {
  const int64_t length = p.op.scoring.seq_len, layers = p.op.num_shared;
  const auto tiles = static_cast<uint32_t>((length + kAverageThreads - 1) / kAverageThreads);
  const int64_t token = int64_t{blockIdx.x % tiles} * kAverageThreads + threadIdx.x;
  const int64_t first = blockIdx.x / tiles * layers;
  if (token >= length) return;
  float* similarity = p.op.scoring.similarity + first * length + token;
  float* norm = p.op.scoring.value_norm + first * length + token;
  float similarities = 0.0f, norms = 0.0f;
#pragma unroll 8
  for (int64_t layer = 0; layer < layers; ++layer) {
    similarities += similarity[layer * length];
    norms += norm[layer * length] * p.inverses[first + layer];
  }
  const float share = 1.0f / static_cast<float>(layers);
  *similarity = similarities * share;
  *norm = norms * share;
}

// The recent frames, the tokens least similar to them, and of the others those with the largest values.
template <bool kStaged>
__global__ void __launch_bounds__(kRowThreads, 1)
    select_dissimilar_kernel(const __grid_constant__ EvictKernel p) {
  LIVEVLM_DYNAMIC_SHARED(TopShared, top);  // and the keys behind it
  TopShared& shared = *top;
  auto* staged = reinterpret_cast<uint32_t*>(top + 1);
  const EvictSimilar& op = p.op;
  const int64_t first_row = blockIdx.x * op.num_shared;
  const auto length = static_cast<int32_t>(op.scoring.seq_len), past = static_cast<int32_t>(op.num_past);
  const auto budget = static_cast<uint32_t>(op.moving.num_kept);
  let_next_kernel_start();
  wait_for_previous_kernels();
  for (int64_t i = blockIdx.x * int64_t{kRowThreads} + threadIdx.x; i < p.moving_words;
       i += gridDim.x * int64_t{kRowThreads}) {
    p.moving_scratch[i] = 0;
  }
  RowFlags<kStaged> chosen(length, p.chosen + blockIdx.x * p.words);
  {
    const auto dissimilarity = [past, row = op.scoring.similarity + first_row * length](int32_t token) {
      return token < past ? score_key(-__ldcg(row + token)) : kNeverKey;
    };
    const RowKeys<kStaged, decltype(dissimilarity)> keys(length, dissimilarity, staged);
    Cut cut{~0u, -1, 0};
    if (op.num_dissimilar > 0) {
      cut = find_cut(keys, static_cast<uint32_t>(op.num_dissimilar), false, budget, shared,
                     [](int32_t, uint32_t key, auto) { return key; });
    }
    keys.each([&](int32_t token, uint32_t key, auto j) {
      chosen.set(j, key != kNeverKey && cut.takes(key, token));
    });
  }
  const auto norm = [row = op.scoring.value_norm + first_row * length](int32_t token) {
    return score_key(__ldcg(row + token));
  };
  const RowKeys<kStaged, decltype(norm)> keys(length, norm, staged);
  const auto key_of = [&](int32_t token, uint32_t key, auto j) {
    return (token >= past && token < length) || chosen[j] ? kAlwaysKey : key;
  };
  const Cut cut = find_cut(keys, budget, false, budget, shared, key_of);
  int32_t* indices = op.indices + first_row * budget;
  const int32_t count =
      write_indices(keys, budget, indices, shared, [&](int32_t token, uint32_t own, auto j) {
        const uint32_t key = key_of(token, own, j);
        return key != kNeverKey && cut.takes(key, token);
      });
  if (threadIdx.x == 0) op.counts[first_row] = count;
  // Layers that share a keep-set get a copy each.
  __syncthreads();
  for (uint32_t i = threadIdx.x; op.num_shared > 1 && i < budget; i += kRowThreads) {
    const int32_t index = indices[i];
#pragma unroll 4
    for (int64_t layer = 1; layer < op.num_shared; ++layer) indices[layer * budget + i] = index;
  }
  for (int64_t layer = 1 + threadIdx.x; layer < op.num_shared; layer += kRowThreads) {
    op.counts[first_row + layer] = count;
  }
}

}  // namespace livevlm
