// SPDX-License-Identifier: Apache-2.0
// Combines what was found for the splits of a sequence, row by row; rows of no sequence get zeros.
#pragma once

#include "block_attention/join_found.cuh"

namespace livevlm {

// What splits have found for a row is merged in eight stripes, and these are added up.
inline constexpr int kStripes = 8, kCombineThreads = kStripes * 32;

// Up to four floats of a row.
__device__ __forceinline__ float4 load_four(const float* source, int32_t count) {
  if (count >= 4 && reinterpret_cast<uintptr_t>(source) % 16 == 0)
    return *reinterpret_cast<const float4*>(source);
  return make_float4(source[0], count > 1 ? source[1] : 0.0f, count > 2 ? source[2] : 0.0f,
                     count > 3 ? source[3] : 0.0f);
}

// A row, and where what its splits have found lies.
struct CombinedRow {
  int64_t first;       // of split 0; -1: finished already, or by combine_rows_kernel
  int32_t from, size;  // the first key, and how many there are in what was found together
  Range seen;

  __device__ __forceinline__ CombinedRow(const AttentionKernel& p, uint32_t flat) {
    const auto group = static_cast<int32_t>(p.group_size.value),
               query = static_cast<int32_t>(p.num_qo_heads.quotient(flat)),
               qo_head = static_cast<int32_t>(flat - query * p.num_qo_heads.value),
               head = static_cast<int32_t>(p.group_size.quotient(qo_head));
    const Sequence sequence = sequence_of(p, query);
    const int32_t rows = sequence.num_rows(p.op), number = query - sequence.first_query;
    const Cut cut = sequence.cut(p);
    from = cut.first, size = cut.split * p.together;
    seen = rows > 0 ? sequence.seen(p.op, number) : Range{0, 0};
    first = found_at(p, sequence, head, number * group + qo_head - head * group, 0);
    if (rows > p.max_rows) first = -1;
  }
};

// Stripe `stripe` of a row, four dimensions from `dim` on: every eighth of neighbours that are merged first,
// kEach of them, if that was not done before.
template <int kEach>
__device__ __forceinline__ Found merge_stripe(const AttentionKernel& p, const CombinedRow& row, int stripe,
                                              int32_t dim) {
  const auto dims = static_cast<int32_t>(p.op.head_dim);
  Found all;
  for (int32_t i = stripe * kEach; i < static_cast<int32_t>(p.num_found.value); i += kStripes * kEach) {
    if (row.from + i * row.size >= row.seen.end) break;
    Found splits[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int32_t begin = row.from + (i + j) * row.size;
      if (begin >= row.seen.end || begin + row.size <= row.seen.begin) continue;
      const int64_t split = row.first + (i + j) * p.op.num_heads;
      const float2 sum = p.found_sums[split];
      splits[j].top = sum.x, splits[j].sum = sum.y;
      if (dim < dims) splits[j].out = load_four(p.found_out + split * dims + dim, dims - dim);
    }
#pragma unroll
    for (int j = 1; j < kEach; ++j) splits[0].merge(splits[j]);
    all.merge(splits[0]);
  }
  return all;
}

template <typename T>
__device__ __forceinline__ void write_row(const BlockAttention& op, uint32_t flat, int32_t dim,
                                          const Found& all) {
  const auto dims = static_cast<int32_t>(op.head_dim);
  const float inverse = inverse_of(all.sum), four[4] = {all.out.x, all.out.y, all.out.z, all.out.w};
  T* const target = static_cast<T*>(op.out) + int64_t{flat} * dims + dim;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dim + i < dims) store_as<T>(target + i, {four[i] * inverse});
  }
  if (dim == 0) op.lse[flat] = log_of(all.top, all.sum);
}

// kWarpEach: a warp for each stripe of a row, for few rows. Otherwise a warp does all of a row's.
//
// The kernel before this one has waited for those ahead of it when this one may start. So what these wrote
// can be read at once, lengths among it, and only what was found has to be waited for.
template <typename T, int kEach, bool kWarpEach>
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits_kernel(const __grid_constant__ AttentionKernel p) {
  __shared__ float4 outs[kStripes][32];
  __shared__ float2 sums[kStripes];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  let_next_kernel_start();
  const uint32_t flat = kWarpEach ? blockIdx.x : blockIdx.x * kStripes + static_cast<uint32_t>(warp);
  const bool exists = flat < static_cast<uint64_t>(p.op.total_q * p.num_qo_heads.value);
  const CombinedRow row(p, exists ? flat : 0);
  wait_for_previous_kernels();
  if (!exists || row.first < 0) return;

  for (int32_t first = 0; first < static_cast<int32_t>(p.op.head_dim); first += 128) {
    const int32_t dim = first + lane * 4;
    Found all;
    const auto add_up = [&](auto top_and_sum, auto out) {
#pragma unroll
      for (int i = 0; i < kStripes; ++i) all.top = fmaxf(all.top, top_and_sum(i).x);
#pragma unroll
      for (int i = 0; i < kStripes; ++i)
        all.add(exp2_approx(top_and_sum(i).x - all.top), top_and_sum(i).y, out(i));
    };
    if constexpr (kWarpEach) {
      const Found own = merge_stripe<kEach>(p, row, warp, dim);
      __syncthreads();  // what was there before has been read
      outs[warp][lane] = own.out;
      if (lane == 0) sums[warp] = make_float2(own.top, own.sum);
      __syncthreads();
      if (warp > 0) continue;
      add_up([&](int i) { return sums[i]; }, [&](int i) { return outs[i][lane]; });
    } else {
      Found stripes[kStripes];
#pragma unroll
      for (int i = 0; i < kStripes; ++i) stripes[i] = merge_stripe<kEach>(p, row, i, dim);
      add_up([&](int i) { return make_float2(stripes[i].top, stripes[i].sum); },
             [&](int i) { return stripes[i].out; });
    }
    write_row<T>(p.op, flat, dim, all);
  }
}

}  // namespace livevlm
