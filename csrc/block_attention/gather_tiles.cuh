// SPDX-License-Identifier: Apache-2.0
// `block_attention` on Hopper for questions: a warpgroup of attend_tiles.cuh that gathers its block's tiles
// from the pool itself.
//
// Few rows read a key, so images of tiles would not pay, and a block has few tiles, so what counts is how
// long the first one takes and that nothing waits for memory after it. Copies run kAhead tiles ahead of the
// products: keys as they are in the pool, to where they will be read. Once there, the thread that copied them
// rotates them in place, with angles that it loaded a tile before. What leads to a copy, an entry of the
// table, then a position, is loaded two tiles before each.
#pragma once

#include "block_attention/angles.cuh"
#include "block_attention/tile_rows.cuh"

namespace livevlm {

#ifdef LIVEVLM_SM90A

// Keys of a pair of tiles, one a lane: lanes 0 to 15 have those of the warp in the first tile of the pair.
template <typename C>
struct KeyFinder {
  const TileAttention& p;
  const int32_t* table;
  Range keys;   // that some row of the block sees; others are not there
  int32_t key;  // this lane's, in the pair that `found` is about
  // Of the pair after the next: the entry of the table. Of the next pair: block and position.
  int32_t far_block, next_block;
  int64_t next_position;
  struct {
    bool there;
    uint32_t k_at, v_at;  // in pieces of 16 bytes
    int32_t angles;
  } found;

  __device__ __forceinline__ KeyFinder(const TileAttention& p, const TileWork& work, int warp, int lane)
      : p(p), table(table_of(p.op, work.tile.sequence.index, work.head)), keys(work.keys) {
    key = work.first_tile * C::kKeys + lane / 16 * C::kKeys + warp * 16 + lane % 16;
    // All that can be under way together is.
    int32_t block = entry_of(key);
    next_block = entry_of(key + 2 * C::kKeys);
    far_block = entry_of(key + 4 * C::kKeys);
    const int64_t position = position_of(block, key);
    next_position = position_of(next_block, key + 2 * C::kKeys);
    find(block, position);
  }

  __device__ __forceinline__ void next() {
    key += 2 * C::kKeys;
    find(next_block, next_position);
    next_block = far_block;
    next_position = position_of(next_block, key + 2 * C::kKeys);
    far_block = entry_of(key + 4 * C::kKeys);
  }

 private:
  __device__ __forceinline__ int32_t entry_of(int32_t of) const {
    if (of < keys.begin || of >= keys.end) return -1;
    return table[p.block_size.quotient(static_cast<uint32_t>(of))];
  }
  __device__ __forceinline__ int32_t slot_of(int32_t of) const {
    const auto number = static_cast<uint32_t>(of);
    return static_cast<int32_t>(number - p.block_size.quotient(number) * p.block_size.value);
  }
  // Negative: nothing to see.
  __device__ __forceinline__ int64_t position_of(int32_t block, int32_t of) const {
    const BlockAttention& op = p.op;
    if (static_cast<uint32_t>(block) >= static_cast<uint64_t>(op.num_blocks)) return -1;
    if (!op.positions) return of;
    const int64_t at = block * op.block_size + slot_of(of);
    if (op.positions_int64) return static_cast<const int64_t*>(op.positions)[at];
    return static_cast<const int32_t*>(op.positions)[at];
  }
  __device__ __forceinline__ void find(int32_t block, int64_t position) {
    found.there = position >= 0;
    const auto in_pool = static_cast<uint32_t>(found.there ? block : 0);
    const auto slot = static_cast<uint32_t>(found.there ? slot_of(key) : 0);
    found.k_at = in_pool * p.k_block + slot * p.k_slot;
    found.v_at = in_pool * p.v_block + slot * p.v_slot;
    found.angles = static_cast<int32_t>(angle_row(p.op, p.op.packed ? key : position));
  }
};

// By a warpgroup, each warp 16 keys of every tile.
template <typename C, typename Angle>
struct TileGather {
  using T = typename C::T;
  static constexpr bool kRotates = Angle::kBytes > 0;
  using Angles = Angles8<std::conditional_t<kRotates, Angle, HalfAngles>>;
  static constexpr int kHalf = C::kDim / 16;  // pieces of half a row: neighbouring lanes have them
  static constexpr int kRowsAtOnce = 32 / kHalf, kPasses = 16 / kRowsAtOnce;
  // The places of a tile this far ahead are free once products with the tile before this one have ended:
  // these wait for nothing that comes later.
  static constexpr int kAhead = C::kStages - 2;
  static_assert(C::kKeys == 64 && kAhead >= 1, "a warp has 16 keys; places for this tile and the one before");

  const TileAttention& p;
  const TileBarriers<C>& barriers;
  unsigned char* memory;
  int32_t num_tiles;
  int warp, lane;
  KeyFinder<C> finder;
  RingPlace<C::kStages> brought, rotated;
  Angles angles[kPasses];  // of the tile to be rotated

  __device__ __forceinline__ TileGather(const TileAttention& p, const TileWork& work,
                                        const TileBarriers<C>& barriers, unsigned char* memory, int warp,
                                        int lane)
      : p(p),
        barriers(barriers),
        memory(memory),
        num_tiles(work.num_tiles),
        warp(warp),
        lane(lane),
        finder(p, work, warp, lane) {
    const BlockAttention& op = p.op;
    const auto* keys =
        reinterpret_cast<const uint4*>(static_cast<const T*>(op.k.data) + work.head * op.k.stride_head) +
        lane % kHalf;
    const auto* values =
        reinterpret_cast<const uint4*>(static_cast<const T*>(op.v.data) + work.head * op.v.stride_head) +
        lane % kHalf;
    bring(0, keys, values);
    load_angles(0);
#pragma unroll 1
    for (int32_t tile = 1; tile < kAhead; ++tile) bring(tile, keys, values);
#pragma unroll 1
    for (int32_t tile = 0; tile < num_tiles; ++tile) {
      bring(tile + kAhead, keys, values);
      cp_async_wait<2 * kAhead + 1>();  // all but the values of this tile, and later tiles
      rotate();
      wgmma_fence_shared();
      shared_barrier_arrive(barriers.keys_full(rotated.stage));
      rotated.next();
    }
    cp_async_wait<0>();
  }

 private:
  __device__ __forceinline__ int row_of(int pass) const {
    return warp * 16 + pass * kRowsAtOnce + lane / kHalf;
  }
  __device__ __forceinline__ int32_t* angle_rows(int stage) const {
    return reinterpret_cast<int32_t*>(memory + C::kAngleRowsAt) + stage * C::kKeys;
  }

  // Starts to copy a tile: two groups of copies, empty ones past the last tile.
  __device__ __forceinline__ void bring(int32_t tile, const uint4* keys, const uint4* values) {
    if (tile >= num_tiles) {
      cp_async_commit();
      cp_async_commit();
      return;
    }
    const int first = tile % 2 * 16, stage = brought.stage;  // lanes from `first` on have the tile's keys
    if (tile > 0 && first == 0) finder.next();
    const uint32_t there = __ballot_sync(~0u, finder.found.there) >> first & 0xffff;
    shared_barrier_wait(barriers.keys_empty(stage), brought.phase ^ 1);
    if (kRotates && lane / 16 * 16 == first) angle_rows(stage)[warp * 16 + lane % 16] = finder.found.angles;
    if (lane == 0)
      reinterpret_cast<uint16_t*>(memory + C::kPresentAt + stage * C::kPresentBytes)[warp] =
          static_cast<uint16_t>(there);
    copy(memory + C::kKeysAt + stage * C::kImageBytes, keys, finder.found.k_at, there, first);
    cp_async_commit();
    shared_barrier_wait(barriers.values_empty(stage), brought.phase ^ 1);
    copy(memory + C::kValuesAt + stage * C::kImageBytes, values, finder.found.v_at, there, first);
    shared_barrier_arrive_copied(barriers.values_full(stage));
    cp_async_commit();
    brought.next();
  }

  __device__ __forceinline__ void copy(unsigned char* image, const uint4* pool, uint32_t at, uint32_t there,
                                       int first) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int own = i * kRowsAtOnce + lane / kHalf, row = row_of(i);
      const uint4* from = pool + __shfl_sync(~0u, at, first + own);
      const bool exists = there >> own & 1;
      cp_async16(image + image_offset<C::kKeys>(row, lane % kHalf), from, exists);
      cp_async16(image + image_offset<C::kKeys>(row, lane % kHalf + kHalf), from + kHalf, exists);
    }
  }

  __device__ __forceinline__ void load_angles(int stage) {
    if constexpr (kRotates) {
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPasses; ++i) angles[i].load(p.op, angle_rows(stage)[row_of(i)], lane % kHalf * 8);
    }
  }

  // The keys that this thread copied; loads the angles of the next tile.
  __device__ __forceinline__ void rotate() {
    if constexpr (kRotates) {
      unsigned char* const image = memory + C::kKeysAt + rotated.stage * C::kImageBytes;
      RingPlace<C::kStages> after = rotated;
      after.next();
      // Past the last tile these are rows of an earlier one, or whatever: no reason to branch.
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int row = row_of(i);
        auto* const low = reinterpret_cast<uint4*>(image + image_offset<C::kKeys>(row, lane % kHalf));
        auto* const high =
            reinterpret_cast<uint4*>(image + image_offset<C::kKeys>(row, lane % kHalf + kHalf));
        uint4 a = *low, b = *high;
        rotate8<T>(a, b, angles[i]);
        *low = a, *high = b;
        angles[i].load(p.op, angle_row(p.op, angle_rows(after.stage)[row]), lane % kHalf * 8);
      }
    }
  }
};

template <typename C>
__device__ __forceinline__ void gather_tiles(const TileAttention& p, const TileWork& work,
                                             const TileBarriers<C>& barriers, unsigned char* memory, int warp,
                                             int lane) {
  if (!p.op.cos_sin_cache) {
    TileGather<C, NoAngles>(p, work, barriers, memory, warp, lane);
  } else if (p.op.cos_sin_half) {
    TileGather<C, HalfAngles>(p, work, barriers, memory, warp, lane);
  } else {
    TileGather<C, FloatAngles>(p, work, barriers, memory, warp, lane);
  }
}
#endif  // LIVEVLM_SM90A

}  // namespace livevlm
