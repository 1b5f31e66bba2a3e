// SPDX-License-Identifier: Apache-2.0
// Combines what was found for the splits of a sequence, a thread block a row; rows of no sequence get zeros.
#pragma once

#include "block_attention/join_found.cuh"

namespace livevlm {

inline constexpr int kCombineThreads = 256, kCombineWarps = kCombineThreads / 32;

// Up to four floats of a row.
__device__ __forceinline__ float4 load_four(const float* source, int32_t count) {
  if (count >= 4 && reinterpret_cast<uintptr_t>(source) % 16 == 0)
    return *reinterpret_cast<const float4*>(source);
  return make_float4(source[0], count > 1 ? source[1] : 0.0f, count > 2 ? source[2] : 0.0f,
                     count > 3 ? source[3] : 0.0f);
}

// A warp takes every eighth of what splits that are neighbours have found together: kEach of them, if that
// was not merged before.
template <typename T, int kEach>
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits_kernel(const __grid_constant__ AttentionKernel p) {
  __shared__ float4 outs[kCombineWarps][32];
  __shared__ float2 sums[kCombineWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  let_next_kernel_start();
  wait_for_previous_kernels();

  const int64_t flat = blockIdx.x;
  const auto query =
      static_cast<int32_t>(blockIdx.x / static_cast<uint32_t>(p.op.num_heads * p.op.group_size));
  const auto dims = static_cast<int32_t>(p.op.head_dim);
  const Sequence sequence = sequence_of(p.op, query);
  const int32_t rows = sequence.num_rows(p.op);
  if (rows > p.max_rows && sequence.most_splits(p) == 1) return;  // finished already
  Range found{0, 0};
  if (rows > 0) found = sequence.parts_of(p, sequence.seen(p.op, query - sequence.first_query));
  const int32_t size = kParts * p.together;
  found = {found.begin / size, (found.end + size - 1) / size};
  const auto group = static_cast<int32_t>(p.op.group_size), heads = static_cast<int32_t>(p.op.num_heads);
  const auto qo_head = static_cast<int32_t>(flat - int64_t{query} * heads * group);
  const int32_t row = (query - sequence.first_query) * group + qo_head % group;
  const int64_t at = found_at(p, sequence, qo_head / group, row, 0);

  for (int32_t first = 0; first < dims; first += 128) {
    const int32_t dim = first + lane * 4;
    Found all;
    for (int32_t i = found.begin / kEach + warp; i * kEach < found.end; i += kCombineWarps) {
      Found splits[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int32_t split = i * kEach + j;
        if (split < found.begin || split >= found.end) continue;
        const float2 sum = p.found_sums[at + int64_t{split} * heads];
        splits[j].top = sum.x, splits[j].sum = sum.y;
        if (dim < dims)
          splits[j].out = load_four(p.found_out + (at + int64_t{split} * heads) * dims + dim, dims - dim);
      }
      Found together;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if constexpr (kEach > 1) together.merge(splits[j]);
      }
      all.merge(kEach > 1 ? together : splits[0]);
    }
    __syncthreads();  // what was there before has been read
    outs[warp][lane] = all.out;
    if (lane == 0) sums[warp] = make_float2(all.top, all.sum);
    __syncthreads();
    if (warp > 0) continue;
    for (int w = 1; w < kCombineWarps; ++w) all.top = fmaxf(all.top, sums[w].x);
    all.sum = 0.0f, all.out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kCombineWarps; ++w)
      all.add(exp2_approx(sums[w].x - all.top), sums[w].y, outs[w][lane]);
    const float inverse = inverse_of(all.sum), four[4] = {all.out.x, all.out.y, all.out.z, all.out.w};
    T* const target = static_cast<T*>(p.op.out) + flat * dims + dim;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (dim + i < dims) store_as<T>(target + i, {four[i] * inverse});
    }
    if (dim == 0) p.op.lse[flat] = log_of(all.top, all.sum);
  }
}

}  // namespace livevlm
