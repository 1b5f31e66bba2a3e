// SPDX-License-Identifier: Apache-2.0
// The comparison of orphans and survivors for any dtype, size and stride, in float32.
#pragma once

#include "kv_merge/nearest_survivor.cuh"

namespace livevlm {

inline constexpr int kFmaTile = 64, kFmaDepth = 16, kFmaThreads = 256;

// Each thread holds 4x4 dot products of a 64x64 tile.
template <typename T>
__global__ void __launch_bounds__(kFmaThreads, 2)
    nearest_fma_kernel(const __grid_constant__ NearestKernel p) {
  __shared__ float orphans[kFmaDepth][kFmaTile + 1], survivors[kFmaDepth][kFmaTile + 1];
  __shared__ unsigned long long best[kFmaTile];
  const MergeTokens& op = p.op;
  const NearestTask task(p, kFmaTile, kFmaTile);
  if (task.first_orphan >= task.num_orphans) return;
  const auto width = static_cast<uint32_t>(op.num_heads * op.head_dim);
  const int32_t* listed = p.orphans + task.batch * op.seq_len;
  const float* inverses = p.inverses + task.batch * op.num_groups;
  const int32_t* indices = op.indices + task.batch * op.num_groups;
  const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
  if (threadIdx.x < kFmaTile) best[threadIdx.x] = 0;
  __syncthreads();

  for (int32_t row = task.first_row; row < task.end_row; row += kFmaTile) {
    float dots[4][4] = {};
    for (uint32_t depth = 0; depth < width; depth += kFmaDepth) {
      for (int i = static_cast<int>(threadIdx.x); i < kFmaTile * kFmaDepth; i += kFmaThreads) {
        const int within = i % kFmaDepth, token = i / kFmaDepth;
        const uint32_t at = depth + within;
        const int32_t orphan = task.first_orphan + token, survivor = row + token;
        float a = 0.0f, b = 0.0f;
        if (at < width && orphan < task.num_orphans) {
          a = static_cast<float>(key_of<T>(op, task.batch, listed[orphan])[element_offset(op, at)]);
        }
        if (at < width && survivor < task.end_row && inverses[survivor] >= 0.0f) {
          b = static_cast<float>(key_of<T>(op, task.batch, indices[survivor])[element_offset(op, at)]);
        }
        orphans[within][token] = a;
        survivors[within][token] = b;
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kFmaDepth; ++k) {
        float a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = orphans[k][y + 16 * i], b[i] = survivors[k][x + 16 * i];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) dots[i][j] += a[i] * b[j];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int32_t survivor = row + x + 16 * j;
      const float inverse = survivor < task.end_row ? inverses[survivor] : -1.0f;
      if (!(inverse >= 0.0f)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) atomicMax(&best[y + 16 * i], nearness(dots[i][j] * inverse, survivor));
    }
  }
  __syncthreads();
  const int32_t orphan = task.first_orphan + static_cast<int32_t>(threadIdx.x);
  if (threadIdx.x < kFmaTile && orphan < task.num_orphans) {
    atomicMax(p.nearest + task.batch * op.seq_len + listed[orphan], best[threadIdx.x]);
  }
}

}  // namespace livevlm
