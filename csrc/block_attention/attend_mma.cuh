// SPDX-License-Identifier: Apache-2.0
// `block_attention` for few rows, as in decoding: bound by reading keys and values, once.
//
// Warps work alone: each has eight rows, one KV head and some of its keys, 16 at a time, the next ones on
// their way meanwhile. Warps of a thread block have the same keys of different heads, so that they share what
// is looked up for them. Logits come out with keys down and rows across, K * Q^T, and so does the result, V^T
// * P^T: eight columns fit a group of seven query heads well. Which element is which in a product is ours to
// choose, so a thread reads pieces of 16 bytes: of a key the two that hold a rotated pair, of values the
// dimensions that it will write.
//
// A warp does one part of a split, or a whole split, part by part: the result is the same to the last bit,
// since combine_splits_kernel merges parts just as a warp does.
#pragma once

#include "block_attention/key_ring.cuh"
#include "block_attention/row_sums.cuh"

namespace livevlm {

inline constexpr int kFewRows = 8, kFewThreads = 128, kFewWarps = kFewThreads / 32;

// Of a warp: its ring, and what it found in the parts before.
template <int kDim, bool kByParts>
inline constexpr int kFewWarpBytes =
    KeyRing<__half, kDim>::kBytes + (kByParts ? 0 : RowSums<__half, kDim>::kKept * 32 * 4);

// Query lane / 4 of the tile, in pieces as those of keys, rotated if q_positions says where; rows past the
// end are zeros.
template <typename T, int kDim, typename Angle>
__device__ __forceinline__ void load_query(const BlockAttention& op, const RowTile& tile, int64_t head,
                                           uint4 (&words)[kDim / 32]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4, first = lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) words[i] = make_uint4(0, 0, 0, 0);
  if (row >= tile.num_rows) return;
  const auto group = static_cast<int32_t>(op.group_size);
  const int32_t in_sequence = tile.first_row + row, query = in_sequence / group;
  const int64_t at = tile.sequence.first_query + query;
  const T* source = static_cast<const T*>(op.q.data) + at * op.q.stride_token +
                    (head * group + in_sequence - query * group) * op.q.stride_head + first;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) words[i] = load_once(reinterpret_cast<const uint4*>(source + i * 32));
  if constexpr (Angle::kBytes > 0) {
    if (!op.q_positions) return;
    const int64_t position = angle_row(op, query_position(op, at));
#pragma unroll
    for (int i = 0; i < kDim / 64; ++i) {
      Angles8<Angle> angles;
      angles.load(op, position, first + i * 32);
      if (i > 0) angles.widen_after(words[i - 1].x);
      rotate8<T>(words[i], words[i + kDim / 64], angles);
    }
  }
}

// The angles of keys lane / 4 and lane / 4 + 8 of a step, brought ahead of the products.
template <typename T, int kDim, typename Angle>
struct StepAngles {
  Angles8<Angle> of[2][kDim / 64];

  __device__ __forceinline__ void load(const BlockAttention& op, const KeyPieces& own) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = __shfl_sync(~0u, own.angles, lane / 4 + i * 8);
#pragma unroll
      for (int j = 0; j < kDim / 64; ++j) of[i][j].load(op, row, lane % 4 * 8 + j * 32);
    }
  }
  __device__ __forceinline__ void rotate(int i, uint4 (&words)[kDim / 32], uint32_t& after) {
#pragma unroll
    for (int j = 0; j < kDim / 64; ++j) {
      of[i][j].widen_after(j > 0 ? words[j - 1].x : after);
      rotate8<T>(words[j], words[j + kDim / 64], of[i][j]);
    }
  }
};

template <typename T, int kDim>
struct StepAngles<T, kDim, NoAngles> {
  __device__ __forceinline__ void load(const BlockAttention&, const KeyPieces&) {}
  __device__ __forceinline__ void rotate(int, uint4 (&)[kDim / 32], uint32_t&) {}
};

template <typename T, int kDim, typename Angle, bool kByParts>
__global__ void __launch_bounds__(kFewThreads, 2)
    attend_mma_kernel(const __grid_constant__ AttentionKernel p) {
  LIVEVLM_DYNAMIC_SHARED(char, memory);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0),
            lane = static_cast<int>(threadIdx.x) % 32;
  let_next_kernel_start();
  wait_for_previous_kernels();

  const auto heads = static_cast<uint32_t>(p.op.num_heads),
             each = static_cast<uint32_t>(p.num_splits * (kByParts ? kParts : 1));
  const uint32_t item = blockIdx.x * kFewWarps + static_cast<uint32_t>(warp), unit = item / heads;
  const int64_t head = item - unit * heads;
  const auto number = static_cast<int32_t>(unit / each), found = static_cast<int32_t>(unit - number * each);
  if (number >= p.num_tiles) return;
  const RowTile tile = tile_of(p, number);
  if (tile.num_rows <= 0) return;
  // Parts that hold keys of the tile.
  const int2 cut = tile.sequence.cut(p);
  const Range wanted = tile.sequence.parts_of(p, tile.keys);
  const int32_t first_part = max(wanted.begin, kByParts ? found : found * kParts);
  const int32_t end_part = min(wanted.end, kByParts ? found + 1 : (found + 1) * kParts);
  if (first_part >= end_part) return;
  const int32_t end = min(tile.keys.end, cut.x + end_part * cut.y);
  int32_t key = cut.x + first_part * cut.y;

  using Ring = KeyRing<T, kDim>;
  char* const own = memory + warp * kFewWarpBytes<kDim, kByParts>;
  Ring ring(p, tile, head, end, own);
  [[maybe_unused]] float* const kept = reinterpret_cast<float*>(own + Ring::kBytes);
  StepAngles<T, kDim, Angle> angles;
  ring.look_up(key);
  ring.bring(0);
  cp_async_commit();
  angles.load(p.op, ring.own);
  ring.look_up(key + kStepKeys);

  uint4 query[kDim / 32];
  load_query<T, kDim, Angle>(p.op, tile, head, query);
  Range seen[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int32_t row = lane % 4 * 2 + j;
    seen[j] = row < tile.num_rows ? tile.seen(p.op, row) : Range{key, end};
  }
  const int32_t all_from = max(seen[0].begin, seen[1].begin), all_to = min(seen[0].end, seen[1].end);

  RowSums<T, kDim> part;
  if constexpr (!kByParts) part.keep(kept);  // that is, nothing
  [[maybe_unused]] int32_t part_end = key + cut.y;
#pragma unroll 1
  for (int step = 0; key < end; step ^= 1) {
    cp_async_wait<0>();
    __syncwarp();  // all lanes' pieces are there, and all lanes are done with the step before
    ring.bring(step ^ 1);
    cp_async_commit();
    const KeyPieces next = ring.own;
    ring.look_up(key + 2 * kStepKeys);

    float logits[4] = {};
    uint4 upper[kDim / 32], lower[kDim / 32];
    ring.key(step, 0, upper);
    angles.rotate(0, upper, upper[0].x);
    ring.key(step, 1, lower);
    angles.rotate(1, lower, upper[kDim / 64 - 1].x);
    multiply<T, kDim>(upper, lower, query, logits);
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[j] *= p.scale;
    const uint32_t present = ring.present_at(step);
    if (!__all_sync(~0u, present == 0xffff && key >= all_from && key + kStepKeys <= all_to))
      hide(logits, seen, key, present);
    part.exponentials(logits);
    part.add(logits, ring, step);
    angles.load(p.op, next);  // not before: there are no registers for them

    key += kStepKeys;
    if (!kByParts && (key == part_end || key >= end)) {
      part.add_lanes();
      part.merge_with(kept);
      if (key >= end) break;
      part.keep(kept);
      part = RowSums<T, kDim>();
      part_end += cut.y;
    }
  }
  if constexpr (kByParts) part.add_lanes();
  part.write(p, tile, head, found);
}

}  // namespace livevlm
