// SPDX-License-Identifier: Apache-2.0
// Combines what gather_tiles.cuh found for the splits of a sequence, a warp a row.
//
// All that was found for a row is loaded at once, kAtOnce splits of it: this kernel takes as long as memory
// takes to answer.
#pragma once

#include "block_attention/join_found.cuh"

namespace livevlm {

inline constexpr int kCombineRows = 8;  // of a thread block

template <typename T, int kDim>
__global__ void __launch_bounds__(kCombineRows * 32)
    combine_rows_kernel(const __grid_constant__ AttentionKernel p) {
  constexpr int kAtOnce = 16, kSides = 128 / kDim;  // splits; of a warp, which take turns with them
  let_next_kernel_start();
  const int lane = static_cast<int>(threadIdx.x) % 32, side = lane * 4 / kDim, dim = lane * 4 % kDim;
  const int64_t flat = int64_t{blockIdx.x} * kCombineRows + threadIdx.x / 32;
  const bool exists = flat < p.op.total_q * p.num_qo_heads.value;
  // The kernel before this one has waited for those ahead of it when this one may start. So what these wrote
  // can be read at once, lengths among it, and only what was found has to be waited for.
  const auto row = static_cast<uint32_t>(exists ? flat : 0), query = p.num_qo_heads.quotient(row);
  const uint32_t qo_head = row - query * p.num_qo_heads.value, head = p.group_size.quotient(qo_head);
  const Sequence sequence = sequence_of(p, static_cast<int32_t>(query));
  const int32_t own_query = static_cast<int32_t>(query) - sequence.first_query;
  const int32_t num_rows = sequence.num_rows(p.op), most_splits = sequence.most_splits(p);
  const int32_t num_splits = min(most_splits, p.num_splits), heads = static_cast<int32_t>(p.num_heads.value);
  const int64_t at =
      found_at(p, sequence, head,
               static_cast<int32_t>(own_query * p.group_size.value + qo_head - head * p.group_size.value), 0);
  const Cut cut = sequence.cut(p);
  const Range seen = sequence.seen(p.op, own_query);
  // Splits with keys that the row sees; for others nothing was written.
  const int32_t before = max(seen.begin - cut.first, 0), up_to = max(seen.end - cut.first, 0);
  const int32_t first_split = before / cut.split;
  const int32_t past_split = min(up_to / cut.split + (up_to % cut.split != 0 ? 1 : 0), num_splits);
  wait_for_previous_kernels();
  // Those with fewer rows are combined by another kernel, those without splits are finished.
  if (!exists || num_rows < p.min_rows || most_splits == 1) return;

  float top = kNoTop, sum = 0.0f, out[4] = {};
#pragma unroll 1
  for (int32_t first = first_split; first < past_split; first += kAtOnce) {
    const auto place_of = [&](int32_t split) { return at + int64_t{min(split, past_split - 1)} * heads; };
    Vec<float, 4> parts[kAtOnce / kSides];
#pragma unroll
    for (int i = 0; i < kAtOnce / kSides; ++i)
      parts[i].load(p.found_out + place_of(first + i * kSides + side) * kDim + dim);
    const int32_t own_split = first + lane % kAtOnce;
    float2 own = p.found_sums[place_of(own_split)];
    if (own_split >= past_split) own = make_float2(kNoTop, 0.0f);
    float most = fmaxf(top, own.x);
#pragma unroll
    for (int i = 1; i < kAtOnce; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
    const float shrink = exp2_approx(top - most), factor = exp2_approx(own.x - most);
    top = most, sum *= shrink;
#pragma unroll
    for (float& value : out) value *= shrink;
#pragma unroll
    for (int i = 0; i < kAtOnce / kSides; ++i) {
      const int number = i * kSides + side;
      const float scale = __shfl_sync(~0u, factor, number), total = __shfl_sync(~0u, own.y, number);
      if (first + number >= past_split) continue;
      float values[4];
      parts[i].widen(values);
      sum = fmaf(scale, total, sum);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j] = fmaf(scale, values[j], out[j]);
    }
  }
  if constexpr (kSides == 2) {
    sum += __shfl_xor_sync(~0u, sum, 16);
#pragma unroll
    for (float& value : out) value += __shfl_xor_sync(~0u, value, 16);
  }
  const float inverse = inverse_of(sum);
  if (side == 0)
    *reinterpret_cast<uint2*>(static_cast<T*>(p.op.out) + flat * kDim + dim) =
        make_uint2(narrow_pair(out[0] * inverse, out[1] * inverse, TypeTag<T>{}),
                   narrow_pair(out[2] * inverse, out[3] * inverse, TypeTag<T>{}));
  if (lane == 0) p.op.lse[flat] = log_of(top, sum);
}

}  // namespace livevlm
