// SPDX-License-Identifier: Apache-2.0
// `block_attention` on Hopper for questions: two warpgroups of attend_tiles.cuh gather their block's tiles
// from the pool themselves.
//
// Few rows read a key, so images of tiles would not pay, and a block has few tiles, so what counts is how
// long the first ones take and that nothing waits for memory after them. Keys are copied as they are in the
// pool to where they will be read, as soon as the table is there: whether anybody may see them is known only
// once their positions are, so values wait for these, as zeros must be where nobody looks. Keys to be rotated
// are rotated in place by the thread that copied them, with angles that the copy engine brought: it is not in
// line behind all the copies under way.
#pragma once

#include "block_attention/key_finder.cuh"

namespace livevlm {

#ifdef LIVEVLM_SM90A

// By kBringers warpgroups, each warp kOwn keys of every tile.
template <typename C>
struct TileGather {
  using T = typename C::T;
  static constexpr bool kRotates = C::kAngleBytes > 0;
  static constexpr int kHalf = C::kDim / 16;  // pieces of half a row: neighbouring lanes have them
  static constexpr int kOwn = KeyFinder<C>::kOwn, kRound = KeyFinder<C>::kTiles;
  static constexpr int kRowsAtOnce = 32 / kHalf, kPasses = kOwn / kRowsAtOnce;
  // A tile is brought in the turn of the one so many after that which had its place.
  static constexpr int kLate = 2;
  static_assert(C::kKeys == 64 && kOwn == 8 && C::kStages >= 4,
                "a byte of bits each; angles two tiles ahead");

  const TileAttention& p;
  const TileBarriers<C>& barriers;
  unsigned char* memory;
  const uint4 *keys, *values;
  int32_t num_tiles;
  int warp, lane;
  KeyFinder<C> finder;
  RingPlace<C::kStages> brought, rotated;

  __device__ __forceinline__ TileGather(const TileAttention& p, const TileWork& work,
                                        const TileBarriers<C>& barriers, unsigned char* memory, int warp,
                                        int lane)
      : p(p),
        barriers(barriers),
        memory(memory),
        keys(pool_of(p.op.k, work.head, lane)),
        values(pool_of(p.op.v, work.head, lane)),
        num_tiles(work.num_tiles),
        warp(warp),
        lane(lane),
        finder(p, work, warp, lane) {
    // At the start all places are free.
    const int32_t at_once = min(num_tiles, min(kRound, C::kStages));
#pragma unroll 1
    for (int32_t tile = 0; tile < at_once; ++tile) bring_keys(tile, tile);
#pragma unroll 1
    for (int32_t tile = 0; tile < at_once; ++tile) {
      bring_values(tile, tile);
      if (tile < 2) bring_angles(tile, tile);
      brought.next();
    }
    if constexpr (!kRotates) {
#pragma unroll 1
      for (int32_t tile = at_once; tile < num_tiles; ++tile) bring(tile);
    } else {
#pragma unroll 1
      for (int32_t tile = at_once; tile < min(num_tiles, C::kStages); ++tile) bring(tile);
#pragma unroll 1
      for (int32_t tile = 0; tile < num_tiles; ++tile) {
        shared_barrier_wait(barriers.angles_full(tile, warp), tile / 2 % 2);
        shared_barrier_wait(barriers.keys_copied(rotated.stage), rotated.phase);
        rotate(tile);
        // No fence here: it would wait for all copies that are under way. Those who start products have one.
        __syncwarp();
        if (lane == 0) shared_barrier_arrive(barriers.keys_full(rotated.stage));
        rotated.next();
        if (tile >= kLate && tile - kLate + C::kStages < num_tiles) bring(tile - kLate + C::kStages);
        if (tile + 2 < num_tiles) bring_angles(tile + 2, (tile + 2) % C::kStages);
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
  }

 private:
  static __device__ __forceinline__ const uint4* pool_of(const Tokens& tokens, int32_t head, int lane) {
    return reinterpret_cast<const uint4*>(static_cast<const T*>(tokens.data) + head * tokens.stride_head) +
           lane % kHalf;
  }
  __device__ __forceinline__ int row_of(int pass) const {
    return warp * kOwn + pass * kRowsAtOnce + lane / kHalf;
  }
  __device__ __forceinline__ unsigned char* angles_of(int32_t tile, int row) const {
    return memory + C::kAnglesAt + (tile % 2 * C::kKeys + row) * C::kAngleBytes;
  }
  __device__ __forceinline__ int32_t* angle_rows(int stage) const {
    return reinterpret_cast<int32_t*>(memory + C::kAngleRowsAt) + stage * C::kKeys + warp * kOwn;
  }

  __device__ __forceinline__ void bring(int32_t tile) {
    if (tile % kRound == 0) finder.next();
    shared_barrier_wait(barriers.keys_empty(brought.stage), brought.phase ^ 1);
    bring_keys(tile, brought.stage);
    shared_barrier_wait(barriers.values_empty(brought.stage), brought.phase ^ 1);
    bring_values(tile, brought.stage);
    brought.next();
  }

  // Lanes from first_of(tile) on have the tile's keys.
  static __device__ __forceinline__ int first_of(int32_t tile) { return tile % kRound * kOwn; }

  __device__ __forceinline__ void bring_keys(int32_t tile, int stage) const {
    const uint32_t exist = __ballot_sync(~0u, finder.in_pool()) >> first_of(tile);
    copy(memory + C::kKeysAt + stage * C::kImageBytes, keys, finder.k_at, exist, tile);
    shared_barrier_arrive_copied(kRotates ? barriers.keys_copied(stage) : barriers.keys_full(stage));
  }

  __device__ __forceinline__ void bring_values(int32_t tile, int stage) const {
    const int first = first_of(tile);
    const uint32_t there = __ballot_sync(~0u, finder.there()) >> first;
    if (kRotates && lane / kOwn * kOwn == first) angle_rows(stage)[lane % kOwn] = finder.angles();
    if (lane == 0) {
      memory[C::kPresentAt + stage * C::kPresentBytes + warp] = static_cast<unsigned char>(there);
      shared_barrier_arrive(barriers.keys_full(stage));
    }
    copy(memory + C::kValuesAt + stage * C::kImageBytes, values, finder.v_at, there, tile);
    shared_barrier_arrive_copied(barriers.values_full(stage));
  }

  __device__ __forceinline__ void copy(unsigned char* image, const uint4* pool, uint32_t at, uint32_t exist,
                                       int32_t tile) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int own = i * kRowsAtOnce + lane / kHalf, row = row_of(i);
      const uint4* from = pool + __shfl_sync(~0u, at, first_of(tile) + own);
      const bool exists = exist >> own & 1;
      cp_async16(image + image_offset<C::kKeys>(row, lane % kHalf), from, exists);
      cp_async16(image + image_offset<C::kKeys>(row, lane % kHalf + kHalf), from + kHalf, exists);
    }
  }

  // By the copy engine, past all keys and values that are still under way.
  __device__ __forceinline__ void bring_angles(int32_t tile, int stage) const {
    if constexpr (kRotates) {
      const uint32_t full = barriers.angles_full(tile, warp);
      if (lane == 0) shared_barrier_expect(full, kOwn * C::kAngleBytes);
      __syncwarp();
      const int32_t own = angle_rows(stage)[lane % kOwn];
      const int32_t first = __shfl_sync(~0u, own, 0);
      const bool in_one = __all_sync(~0u, own == first + lane % kOwn);  // as positions mostly are
      if (lane < (in_one ? 1 : kOwn))
        copy_to_shared(shared_address(angles_of(tile, warp * kOwn + lane)),
                       static_cast<const char*>(p.op.cos_sin_cache) + own * int64_t{C::kAngleBytes},
                       (in_one ? kOwn : 1) * C::kAngleBytes, full);
    }
  }

  // The keys that this thread copied.
  __device__ __forceinline__ void rotate(int32_t tile) const {
    if constexpr (kRotates) {
      unsigned char* const image = memory + C::kKeysAt + rotated.stage * C::kImageBytes;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int row = row_of(i);
        auto* const low = reinterpret_cast<uint4*>(image + image_offset<C::kKeys>(row, lane % kHalf));
        auto* const high =
            reinterpret_cast<uint4*>(image + image_offset<C::kKeys>(row, lane % kHalf + kHalf));
        Angles8<typename C::Angle> angles;
        angles.load_shared(angles_of(tile, row), C::kDim, lane % kHalf * 8);
        uint4 a = *low, b = *high;
        rotate8<T>(a, b, angles);
        *low = a, *high = b;
      }
    }
  }
};
#endif  // LIVEVLM_SM90A

}  // namespace livevlm
