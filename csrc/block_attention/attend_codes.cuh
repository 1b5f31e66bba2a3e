// SPDX-License-Identifier: Apache-2.0
// `block_attention` of few rows over quantised pools.
#pragma once

#include "block_attention/code_values.cuh"

namespace livevlm {

// As attend_mma_kernel, but for the ring.
template <int kDim, typename Angle, WarpWork kWork, typename Ring>
__global__ void __launch_bounds__(32 * kFewWarps<kWork>, Ring::kBlocks)
    attend_codes_kernel(const __grid_constant__ AttentionKernel p) {
  constexpr bool kPart = kWork == WarpWork::kPart, kMany = kWork == WarpWork::kSplits;
  using Sums = typename Ring::Sums;
  LIVEVLM_DYNAMIC_SHARED(char, memory);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0),
            lane = static_cast<int>(threadIdx.x) % 32;
  const WarpItem<kWork> item(p, warp);
  wait_for_previous_kernels();
  let_next_kernel_start();  // combine_splits_kernel relies on this order
  if (kPart && warp == 0) bring_table_near(p, item.number, item.head);

  if (item.number >= static_cast<uint32_t>(p.num_tiles)) return;
  const RowTile tile = tile_of(p, static_cast<int32_t>(item.number));
  if (tile.num_rows <= 0) return;
  const Cut cut = tile.sequence.cut(p);
  const WarpKeys keys = item.keys_of(tile, cut, warp);
  if (keys.none) return;
  const int64_t head = item.head;
  const int32_t end = keys.end, found = item.found;
  int32_t key = keys.key, part_number = keys.part;

  char* const own = memory + warp * kFewWarpBytes<kDim, kWork, Ring>;
  Ring ring(p, tile, head, end, own);
  float* const kept = reinterpret_cast<float*>(own + (kPart ? 0 : Ring::kBytes));
  [[maybe_unused]] float* const kept_splits = kept + Sums::kKept * 32;
  CodeAngles<kDim, Angle> angles;
  ring.start(key);
  angles.load(ring, 0);
  ring.look_ahead(key);

  uint4 query[kDim / 32];
  ring.template load_queries<Angle>(tile, head, query);
  Range seen[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int32_t row = lane % 4 * 2 + j;
    seen[j] = row < tile.num_rows ? tile.seen(p, row) : Range{key, end};
  }
  const int32_t all_from = max(seen[0].begin, seen[1].begin), all_to = min(seen[0].end, seen[1].end);

  Sums part;
  if constexpr (!kPart) part.keep(kept);  // that is, nothing
  if constexpr (kMany) part.keep(kept_splits);
  [[maybe_unused]] int32_t part_end = key + cut.part;
#pragma unroll 1
  for (int step = 0; key < end; step = Ring::after(step)) {
    ring.turn(step, key);
    float logits[4] = {};
    uint4 upper[kDim / 32], lower[kDim / 32];
    ring.keys(step, key, angles, upper, lower);
    multiply<__half, kDim>(upper, lower, query, logits);
    ring.scale(step, logits);
    const uint32_t present = ring.present_at(step);
    if (!__all_sync(~0u, present == 0xffff && key >= all_from && key + kStepKeys <= all_to))
      hide(logits, seen, key, present);
    part.exponentials(logits);
    ring.add(part, logits, step);
    angles.load(ring, Ring::after(step));  // not before: there are no registers for them

    key += kStepKeys;
    if (kPart || (key != part_end && key < end)) continue;
    part.add_lanes();
    part.merge_with(kept);
    ++part_number;
    if (kMany && (part_number % kParts == 0 || key >= end)) {
      part.merge_with(kept_splits);
      part.keep(kept_splits);
      if (key >= end) break;
      part = Sums();
      part.keep(kept);
    } else {
      if (key >= end) break;
      part.keep(kept);
      part = Sums();
    }
    part_end += cut.part;
  }
  if constexpr (kPart) {
    part.add_lanes();
    cp_async_wait<0>();
    __syncwarp();  // the ring is done with
    part.keep(kept);
    __syncthreads();
    merge_parts<__half, kDim, Ring>(p, tile, head, found, memory);
  } else {
    part.write(p, tile, head, found);
  }
}

}  // namespace livevlm
