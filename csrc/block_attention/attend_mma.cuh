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
// Parts that a warp, or a thread block of kPart, goes through.
template <WarpWork kWork>
inline constexpr int kFewParts = kWork == WarpWork::kSplits ? kTogether * kParts : kParts;
// Of a warp: its ring, and what it found in the parts before, and in the splits before.
template <int kDim, WarpWork kWork, typename Ring = KeyRing<__half, kDim>>
inline constexpr int kFewWarpBytes =
    Ring::kBytes + static_cast<int>(kWork) * RowSums<__half, kDim>::kKept * 32 * 4;

// Query lane / 4 of the tile, in pieces as those of keys, rotated if q_positions says where; rows past the
// end are zeros.
template <typename T, int kDim, typename Angle, typename Ring = KeyRing<T, kDim>>
__device__ __forceinline__ void load_query(const AttentionKernel& p, const RowTile& tile, int64_t head,
                                           uint4 (&words)[kDim / 32]) {
  const BlockAttention& op = p.op;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) words[i] = make_uint4(0, 0, 0, 0);
  if (row >= tile.num_rows) return;
  const auto group = static_cast<int32_t>(op.group_size);
  const int32_t query = tile.query_of(p, row);
  const int64_t at = tile.sequence.first_query + query;
  const T* source = static_cast<const T*>(op.q.data) + at * op.q.stride_token +
                    (head * group + tile.first_row + row - query * group) * op.q.stride_head;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i)
    words[i] = load_once(reinterpret_cast<const uint4*>(source + Ring::first_dim(lane, i)));
  if constexpr (Angle::kBytes > 0) {
    if (!op.q_positions) return;
    const int64_t position = angle_row(op, query_position(op, at));
#pragma unroll
    for (int i = 0; i < kDim / 64; ++i) {
      Angles8<Angle> angles;
      angles.load(op, position, Ring::first_dim(lane, i));
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
      const int32_t row = max(0, __shfl_sync(~0u, own.angles, lane / 4 + i * 8));
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
template <typename T, int kDim, typename Ring = KeyRing<T, kDim>>
__device__ __forceinline__ void merge_parts(const AttentionKernel& p, const RowTile& tile, int64_t head,
                                            int32_t split, const char* memory) {
  using Sums = RowSums<T, kDim>;
  constexpr int kOuts = Sums::kHalves * 16;
  static_assert(kOuts <= kParts * 4);
  const int first = static_cast<int>(threadIdx.x) / 32 * 4, lane = static_cast<int>(threadIdx.x) % 32;
  if (first >= kOuts) return;
  const auto kept = [&](int part, int i) {
    return reinterpret_cast<const float*>(memory +
                                          part * kFewWarpBytes<kDim, WarpWork::kPart, Ring>)[i * 32 + lane];
  };
  float top[2] = {kNoTop, kNoTop}, sum[2] = {}, out[4] = {}, one[kParts][2], other[kParts][2];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {  // first all factors, which do not wait for what they are for
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const MergeFactors factors(top[j], kept(part, kOuts + j));
      top[j] = factors.top, one[part][j] = factors.one, other[part][j] = factors.other;
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const auto merge = [&](float& into, int i) {
        into = MergeFactors::merged(one[part][j], into, other[part][j], kept(part, i));
      };
      merge(sum[j], kOuts + 2 + j);
      merge(out[j], first + j);
      merge(out[j + 2], first + j + 2);
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

// The first key that a warp goes through, its part, and where its keys end.
struct WarpKeys {
  int32_t key, part, end;
  bool none;  // for the whole thread block, if its warps have parts of a split
};

// What a warp is to do: a tile, a KV head, and number `found` of what is found for them.
template <WarpWork kWork>
struct WarpItem {
  int64_t head;
  uint32_t number;
  int32_t found;

  __device__ __forceinline__ WarpItem(const AttentionKernel& p, int warp) {
    const uint32_t item =
        kWork == WarpWork::kPart ? blockIdx.x : blockIdx.x * kFewWarps<kWork> + static_cast<uint32_t>(warp);
    const uint32_t unit = p.num_heads.quotient(item);
    number = p.num_found.quotient(unit);
    head = item - unit * p.num_heads.value;
    found = static_cast<int32_t>(unit - number * p.num_found.value);
  }

  __device__ __forceinline__ WarpKeys keys_of(const RowTile& tile, const Cut& cut, int warp) const {
    constexpr bool kPart = kWork == WarpWork::kPart;
    int32_t part = found * kFewParts<kWork>, key = cut.first + part * cut.part;
    int32_t end = min(tile.keys.end, key + kFewParts<kWork> * cut.part);
    const bool none = key >= end || end <= tile.keys.begin;
    if constexpr (kPart) key += warp * cut.part, end = min(end, key + cut.part);
    if (key < tile.keys.begin) {  // parts before a window hold nothing
      const int32_t skipped = min((tile.keys.begin - key) / cut.part, kPart ? 1 : kFewParts<kWork>);
      part += skipped, key += skipped * cut.part;
    }
    return {key, part, end, none};
  }
};

// Where keys lie is looked up when it is known how many there are; until then the table can be on its way.
__device__ __forceinline__ void bring_table_near(const AttentionKernel& p, uint32_t tile, int64_t head) {
  const auto entry = static_cast<int32_t>(threadIdx.x) % 32 * 32;
  if (p.op.cu_seqlens_q || tile >= static_cast<uint32_t>(p.num_tiles) || entry >= p.op.max_blocks) return;
  prefetch_l2(table_of(p.op, static_cast<int32_t>(p.tiles_each.quotient(tile)), head) + entry);
}

template <typename T, int kDim, typename Angle, WarpWork kWork>
__global__ void __launch_bounds__(32 * kFewWarps<kWork>, kWork == WarpWork::kPart ? 1 : 2)
    attend_mma_kernel(const __grid_constant__ AttentionKernel p) {
  constexpr bool kPart = kWork == WarpWork::kPart, kMany = kWork == WarpWork::kSplits;
  constexpr bool kEarly = Angle::kBytes <= 2;
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

  using Ring = KeyRing<T, kDim>;
  char* const own = memory + warp * kFewWarpBytes<kDim, kWork>;
  Ring ring(p, tile, head, end, own);
  float* const kept = reinterpret_cast<float*>(own + (kPart ? 0 : Ring::kBytes));
  [[maybe_unused]] float* const kept_splits = kept + RowSums<T, kDim>::kKept * 32;
  StepAngles<T, kDim, Angle> angles;
  ring.look_up(key);
  ring.bring(0, key);
  const KeyPieces first = ring.own;
  ring.look_up(key + kStepKeys);
  ring.bring(1, key + kStepKeys);
  KeyPieces next = ring.own;
  ring.look_up(key + 2 * kStepKeys);

  uint4 query[kDim / 32];
  load_query<T, kDim, Angle>(p, tile, head, query);
  Range seen[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int32_t row = lane % 4 * 2 + j;
    seen[j] = row < tile.num_rows ? tile.seen(p, row) : Range{key, end};
  }
  const int32_t all_from = max(seen[0].begin, seen[1].begin), all_to = min(seen[0].end, seen[1].end);

  angles.load(p.op, first);
  KeyBits bits(first);

  RowSums<T, kDim> part;
  if constexpr (!kPart) part.keep(kept);  // that is, nothing
  if constexpr (kMany) part.keep(kept_splits);
  [[maybe_unused]] int32_t part_end = key + cut.part;
#pragma unroll 1
  for (int step = 0; key < end; step ^= 1) {
    cp_async_wait<1>();
    __syncwarp();  // all lanes' pieces of this step are there
    float logits[4] = {};
    uint4 upper[kDim / 32], lower[kDim / 32];
    ring.key(step, 0, upper);
    angles.rotate(0, upper, upper[0].x);
    ring.key(step, 1, lower);
    angles.rotate(1, lower, upper[kDim / 64 - 1].x);
    multiply<T, kDim>(upper, lower, query, logits);
    if constexpr (kEarly) angles.load(p.op, next);  // not before: there are no registers for them
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[j] *= p.scale;
    if (!__all_sync(~0u, bits.present == 0xffff && key >= all_from && key + kStepKeys <= all_to))
      hide(logits, seen, key, bits.present);
    if (bits.empty) ring.clear_values(step, bits.empty);
    part.exponentials(logits);
    part.add(logits, ring, step);
    if constexpr (!kEarly) angles.load(p.op, next);
    __syncwarp();  // all lanes are done with this step
    ring.bring(step, key + 2 * kStepKeys);
    bits = KeyBits(next);
    next = ring.own;
    ring.look_up(key + 3 * kStepKeys);

    key += kStepKeys;
    if (kPart || (key != part_end && key < end)) continue;
    part.add_lanes();
    part.merge_with(kept);
    ++part_number;
    if (kMany && (part_number % kParts == 0 || key >= end)) {
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
    part_end += cut.part;
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
