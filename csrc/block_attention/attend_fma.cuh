// SPDX-License-Identifier: Apache-2.0
// `block_attention` for every dtype, head_dim, stride and alignment, without tensor cores.
//
// A thread block goes through the keys of a split 32 at a time, one a lane, with eight rows of queries; keys,
// values and results are float32 in shared memory.
#pragma once

#include "block_attention/codes.cuh"
#include "block_attention/join_found.cuh"

namespace livevlm {

inline constexpr int kFmaAttentionThreads = 128, kFmaRows = 8, kFmaKeys = 32;

inline int64_t attend_fma_floats(int64_t head_dim) {
  return kFmaKeys * (2 * head_dim + 1) + kFmaRows * (2 * head_dim + kFmaKeys + 3);
}

__device__ __forceinline__ float angle_of(const BlockAttention& op, int64_t index) {
  return op.cos_sin_half ? __half2float(static_cast<const __half*>(op.cos_sin_cache)[index])
                         : static_cast<const float*>(op.cos_sin_cache)[index];
}

// An element, rotated by `angles`, a row of the table, if there is one and that is not negative. `own(dim)`
// is the element that it was.
template <typename Own>
__device__ __forceinline__ float turned(const BlockAttention& op, int dim, int64_t angles, Own own_of) {
  const float own = own_of(dim);
  if (!op.cos_sin_cache || angles < 0) return own;
  const auto half = static_cast<int>(op.head_dim) / 2;
  const bool low = dim < half;
  const float other = own_of(low ? dim + half : dim - half);
  const int64_t at = angles * op.head_dim + (low ? dim : dim - half);
  const float cosine = angle_of(op, at), sine = angle_of(op, at + half);
  return low ? own * cosine - other * sine : own * cosine + other * sine;
}

// A row of elements as floats, one dimension; rotated if there is a table and `angles`, a row of it, is not
// negative.
template <typename T>
__device__ __forceinline__ float element(const BlockAttention& op, const T* row, int64_t stride, int dim,
                                         int64_t angles) {
  return turned(op, dim, angles, [&](int i) { return static_cast<float>(row[i * stride]); });
}

template <typename T>
__global__ void __launch_bounds__(kFmaAttentionThreads, 4)
    attend_fma_kernel(const __grid_constant__ AttentionKernel p) {
  constexpr int kWarps = kFmaAttentionThreads / 32;
  LIVEVLM_DYNAMIC_SHARED(float, memory);
  const auto dims = static_cast<int>(p.op.head_dim);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  float* const queries = memory;
  float* const out = queries + kFmaRows * dims;
  float* const keys = out + kFmaRows * dims;  // one more than dims apart: lanes read different banks
  float* const values = keys + kFmaKeys * (dims + 1);
  float* const weights = values + kFmaKeys * dims;
  float *const tops = weights + kFmaRows * kFmaKeys, *const sums = tops + kFmaRows,
               *const shrinks = sums + kFmaRows;
  __shared__ KeyPlace places[kFmaKeys];
  wait_for_previous_kernels();
  let_next_kernel_start();  // combine_splits_kernel relies on this order

  const auto split = static_cast<int32_t>(blockIdx.x % static_cast<uint32_t>(p.num_splits));
  const uint32_t unit = blockIdx.x / static_cast<uint32_t>(p.num_splits);
  const auto heads = static_cast<uint32_t>(p.op.num_heads);
  const int64_t head = unit % heads;
  const RowTile tile = tile_of(p, static_cast<int32_t>(unit / heads));
  if (tile.num_rows <= 0) return;
  const Range range = tile.keys_of(p, split);
  if (range.begin >= range.end) return;

  const int32_t* const table = table_of(p.op, tile.sequence.index, head);
  const auto group = static_cast<int32_t>(p.op.group_size);
  for (int i = thread; i < tile.num_rows * dims; i += kFmaAttentionThreads) {
    const int32_t row = tile.first_row + i / dims, query = tile.sequence.first_query + row / group;
    const T* source = static_cast<const T*>(p.op.q.data) + query * p.op.q.stride_token +
                      (head * group + row % group) * p.op.q.stride_head;
    const int64_t angles = p.op.q_positions ? angle_row(p.op, query_position(p.op, query)) : -1;
    queries[i] = element(p.op, source, p.op.q.stride_dim, i % dims, angles) * p.scale;
    out[i] = 0.0f;
  }
  if (thread < kFmaRows) tops[thread] = kNoTop, sums[thread] = 0.0f;

  for (int32_t first = range.begin; first < range.end; first += kFmaKeys) {
    __syncthreads();  // the keys before are done with
    if (warp == 0) places[lane] = place_of(p, table, first + lane, range.end);
    __syncthreads();
    for (int i = thread; i < kFmaKeys * dims; i += kFmaAttentionThreads) {
      const int key = i / dims, dim = i % dims;
      const KeyPlace& at = places[key];
      float k = 0.0f, v = 0.0f;
      if (at.block >= 0 && p.op.format != PoolFormat::kFloats) {
        k = turned(p.op, dim, at.angles,
                   [&](int j) { return code_element(p.op, true, at.block, at.slot, head, j); });
        v = code_element(p.op, false, at.block, at.slot, head, dim);
      } else if (at.block >= 0) {
        const T* source = static_cast<const T*>(p.op.k.data) + at.block * p.op.k.stride_batch +
                          at.slot * p.op.k.stride_token + head * p.op.k.stride_head;
        k = element(p.op, source, p.op.k.stride_dim, dim, at.angles);
        v = static_cast<float>(static_cast<const T*>(
            p.op.v.data)[at.block * p.op.v.stride_batch + at.slot * p.op.v.stride_token +
                         head * p.op.v.stride_head + dim * p.op.v.stride_dim]);
      }
      keys[key * (dims + 1) + dim] = k;
      values[i] = v;
    }
    __syncthreads();
    for (int row = warp; row < tile.num_rows; row += kWarps) {
      const Range seen = tile.seen(p, row);
      const int32_t key = first + lane;
      float logit = 0.0f;
      for (int dim = 0; dim < dims; ++dim)
        logit = fmaf(queries[row * dims + dim], keys[lane * (dims + 1) + dim], logit);
      if (places[lane].block < 0 || key < seen.begin || key >= seen.end) logit = -INFINITY;
      float top = fmaxf(tops[row], logit);
#pragma unroll
      for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      const float weight = exp2f(logit - top);
      float sum = weight;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      weights[row * kFmaKeys + lane] = weight;
      __syncwarp();  // all lanes have read the top before
      if (lane == 0) {
        shrinks[row] = exp2f(tops[row] - top);
        sums[row] = fmaf(sums[row], shrinks[row], sum);
        tops[row] = top;
      }
    }
    __syncthreads();
    for (int i = thread; i < tile.num_rows * dims; i += kFmaAttentionThreads) {
      const int row = i / dims, dim = i % dims;
      float sum = out[i] * shrinks[row];
      for (int key = 0; key < kFmaKeys; ++key)
        sum = fmaf(weights[row * kFmaKeys + key], values[key * dims + dim], sum);
      out[i] = sum;
    }
  }
  __syncthreads();
  for (int i = thread; i < tile.num_rows * dims; i += kFmaAttentionThreads) {
    const int row = i / dims, dim = i % dims;
    const int64_t at = found_at(p, tile.sequence, head, tile.first_row + row, split);
    p.found_out[at * dims + dim] = out[i];
    if (dim == 0) p.found_sums[at] = make_float2(tops[row], sums[row]);
  }
}

}  // namespace livevlm
