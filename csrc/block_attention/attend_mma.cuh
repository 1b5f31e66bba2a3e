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
// A warp goes through one part of a split, a split or some neighbouring ones, part by part: the result is the
// same to the last bit, since all merge the parts of a split one after the other, then the splits, as
// combine_splits_kernel does. So a single sequence keeps the GPU busy, and many do not have it merge more
// than it reads.
#pragma once

#include "block_attention/key_ring.cuh"
#include "block_attention/row_sums.cuh"

namespace livevlm {

inline constexpr int kFewRows = 8;

// What a warp goes through. Warps of the parts of a split are a thread block, which merges what they find.
enum class WarpWork { kPart, kSplit, kSplits };
template <WarpWork kWork>
inline constexpr int kFewWarps = kWork == WarpWork::kPart ? kParts : 4;
// Of a warp: its ring, and what it found in the parts before, and in the splits before.
template <int kDim, WarpWork kWork>
inline constexpr int kFewWarpBytes =
    KeyRing<__half, kDim>::kBytes + static_cast<int>(kWork) * RowSums<__half, kDim>::kKept * 32 * 4;

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

// Merges what the warps of a thread block found in the parts of a split; a warp does some of the dimensions.
template <typename T, int kDim>
__device__ __forceinline__ void merge_parts(const AttentionKernel& p, const RowTile& tile, int64_t head,
                                            int32_t split, const char* memory) {
  using Sums = RowSums<T, kDim>;
  constexpr int kOuts = Sums::kHalves * 16;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = warp * 4; first < kOuts; first += kParts * 4) {
    float top[2] = {kNoTop, kNoTop}, sum[2] = {}, out[4] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float* kept =
          reinterpret_cast<const float*>(memory + part * kFewWarpBytes<kDim, WarpWork::kPart>) + lane;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const MergeFactors factors(top[j], kept[(kOuts + j) * 32]);
        top[j] = factors.top;
        sum[j] = factors.merged(sum[j], kept[(kOuts + 2 + j) * 32]);
        out[j] = factors.merged(out[j], kept[(first + j) * 32]);
        out[j + 2] = factors.merged(out[j + 2], kept[(first + j + 2) * 32]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t row = lane % 4 * 2 + j;
      if (row >= tile.num_rows) continue;
      const int64_t at = found_at(p, tile.sequence, head, tile.first_row + row, split);
      float* const target = p.found_out + at * kDim + first / 16 * 64 + lane / 4 * 8 + first / 4 % 4 * 2;
      *reinterpret_cast<float2*>(target) = make_float2(out[j], out[j + 2]);
      if (first == 0 && lane < 4) p.found_sums[at] = make_float2(top[j], sum[j]);
    }
  }
}

template <typename T, int kDim, typename Angle, WarpWork kWork>
__global__ void __launch_bounds__(32 * kFewWarps<kWork>, kWork == WarpWork::kPart ? 1 : 2)
    attend_mma_kernel(const __grid_constant__ AttentionKernel p) {
  constexpr bool kPart = kWork == WarpWork::kPart, kMany = kWork == WarpWork::kSplits;
  constexpr int kWarps = kFewWarps<kWork>;
  LIVEVLM_DYNAMIC_SHARED(char, memory);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0),
            lane = static_cast<int>(threadIdx.x) % 32;
  let_next_kernel_start();
  wait_for_previous_kernels();

  const auto heads = static_cast<uint32_t>(p.op.num_heads), each = static_cast<uint32_t>(p.num_found);
  const uint32_t item = kPart ? blockIdx.x : blockIdx.x * kWarps + static_cast<uint32_t>(warp);
  const uint32_t unit = item / heads;
  const int64_t head = item - unit * heads;
  const auto number = static_cast<int32_t>(unit / each), found = static_cast<int32_t>(unit - number * each);
  if (number >= p.num_tiles) return;
  const RowTile tile = tile_of(p, number);
  if (tile.num_rows <= 0) return;
  // Parts that hold keys of the tile.
  constexpr int kPartsEach = kMany ? kTogether * kParts : kParts;
  const int2 cut = tile.sequence.cut(p);
  const Range wanted = tile.sequence.parts_of(p, tile.keys);
  Range parts{max(wanted.begin, found * kPartsEach), min(wanted.end, (found + 1) * kPartsEach)};
  if (parts.begin >= parts.end) return;
  if constexpr (kPart) parts = {found * kParts + warp, found * kParts + warp + 1};
  const int32_t end = min(tile.keys.end, cut.x + parts.end * cut.y);
  int32_t key = max(cut.x + parts.begin * cut.y, kPart ? cut.x + wanted.begin * cut.y : 0);

  using Ring = KeyRing<T, kDim>;
  char* const own = memory + warp * kFewWarpBytes<kDim, kWork>;
  Ring ring(p, tile, head, end, own);
  float* const kept = reinterpret_cast<float*>(own + (kPart ? 0 : Ring::kBytes));
  [[maybe_unused]] float* const kept_splits = kept + RowSums<T, kDim>::kKept * 32;
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
  if constexpr (!kPart) part.keep(kept);  // that is, nothing
  if constexpr (kMany) part.keep(kept_splits);
  [[maybe_unused]] int32_t number_of_part = parts.begin, part_end = key + cut.y;
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
    if (kPart || (key != part_end && key < end)) continue;
    part.add_lanes();
    part.merge_with(kept);
    ++number_of_part;
    if (kMany && (number_of_part % kParts == 0 || key >= end)) {
      part.merge_with(kept_splits);
      part.keep(kept_splits);
      if (key >= end) break;
      part = RowSums<T, kDim>();
      part.keep(kept);
    } else {
      if (key >= end) break;
      part.keep(kept);
      part = RowSums<T, kDim>();
    }
    part_end += cut.y;
  }
  if constexpr (kPart) {
    part.add_lanes();
    cp_async_wait<0>();
    __syncwarp();  // the ring is done with
    part.keep(kept);
    __syncthreads();
    merge_parts<T, kDim>(p, tile, head, found, memory);
  } else {
    part.write(p, tile, head, found);
  }
}

}  // namespace livevlm
