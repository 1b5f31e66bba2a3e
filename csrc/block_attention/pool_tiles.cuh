// SPDX-License-Identifier: Apache-2.0
// `block_attention` for a few hundred rows without warpgroup products: tiles that a thread block gathers from
// the pool itself, as gather_tiles.cuh does on Hopper. Images would not pay.
#pragma once

#include "block_attention/key_finder.cuh"
#include "block_attention/mma_tiles.cuh"

namespace livevlm {

// A warp brings 16 keys of every tile. The threads that copied them rotate them in place once they are there,
// with angles that were loaded while the tile before was worked on.
template <typename C>
struct PoolTiles {
  using T = typename C::T;
  static constexpr int kHalf = C::kDim / 16;  // pieces of half a row: neighbouring lanes have them
  static constexpr int kRowsAtOnce = 32 / kHalf, kPasses = 16 / kRowsAtOnce;
  static_assert(C::kStages == 2, "angles are loaded between the keys of their tile and those of the next");

  const TileAttention& p;
  const uint4 *keys, *values;  // of the head, from the lane's piece of a row on
  unsigned char* memory;
  int32_t num_tiles;
  int warp, lane;
  KeyFinder<C> finder;         // of the tile last brought
  AnyAngles8 angles[kPasses];  // of the next tile to be rotated

  __device__ __forceinline__ PoolTiles(const TileAttention& p, const TileWork& work, unsigned char* memory)
      : p(p),
        memory(memory),
        num_tiles(work.num_tiles),
        warp(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0)),
        lane(static_cast<int>(threadIdx.x) % 32),
        finder(p, work, warp, lane) {
    const BlockAttention& op = p.op;
    keys = reinterpret_cast<const uint4*>(static_cast<const T*>(op.k.data) + work.head * op.k.stride_head) +
           lane % kHalf;
    values = reinterpret_cast<const uint4*>(static_cast<const T*>(op.v.data) + work.head * op.v.stride_head) +
             lane % kHalf;
  }

  // Tiles in turn, the values of each before the keys of the next.
  __device__ __forceinline__ void bring_keys(int32_t tile) {
    if (tile >= num_tiles) return;
    const int first = first_lane(tile), stage = tile % C::kStages;
    if (tile > 0 && first == 0) finder.next();
    const uint32_t there = present(first);
    if (lane == 0)
      reinterpret_cast<uint16_t*>(memory + C::kPresentAt + stage * C::kPresentBytes)[warp] =
          static_cast<uint16_t>(there);
    copy(memory + C::kKeysAt + stage * C::kImageBytes, keys, finder.k_at, there, first);
  }
  __device__ __forceinline__ void bring_values(int32_t tile) const {
    if (tile >= num_tiles) return;
    const int first = first_lane(tile);
    copy(memory + C::kValuesAt + tile % C::kStages * C::kImageBytes, values, finder.v_at, present(first),
         first);
  }

  // Of the tile whose keys were brought last.
  __device__ __forceinline__ void load_angles(int32_t tile) {
    if (!p.op.cos_sin_cache || tile >= num_tiles) return;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int own = i * kRowsAtOnce + lane / kHalf;
      angles[i].load(p.op, __shfl_sync(~0u, finder.angles(), first_lane(tile) + own), lane % kHalf * 8);
    }
  }

  // The pieces of keys that this thread brought.
  __device__ __forceinline__ void rotate(int32_t tile) const {
    if (!p.op.cos_sin_cache) return;
    unsigned char* const image = memory + C::kKeysAt + tile % C::kStages * C::kImageBytes;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = warp * 16 + i * kRowsAtOnce + lane / kHalf;
      auto* const low = reinterpret_cast<uint4*>(image + image_offset<C::kKeys>(row, lane % kHalf));
      auto* const high = reinterpret_cast<uint4*>(image + image_offset<C::kKeys>(row, lane % kHalf + kHalf));
      uint4 a = *low, b = *high;
      angles[i].template rotate<T>(p.op, a, b);
      *low = a, *high = b;
    }
  }

 private:
  static __device__ __forceinline__ int first_lane(int32_t tile) { return tile % 2 * 16; }
  __device__ __forceinline__ uint32_t present(int first) const {
    return __ballot_sync(~0u, finder.there()) >> first & 0xffff;
  }
  __device__ __forceinline__ void copy(unsigned char* image, const uint4* pool, uint32_t at, uint32_t there,
                                       int first) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int own = i * kRowsAtOnce + lane / kHalf, row = warp * 16 + own;
      const uint4* from = pool + __shfl_sync(~0u, at, first + own);
      const bool exists = there >> own & 1;
      cp_async16(image + image_offset<C::kKeys>(row, lane % kHalf), from, exists);
      cp_async16(image + image_offset<C::kKeys>(row, lane % kHalf + kHalf), from + kHalf, exists);
    }
  }
};

}  // namespace livevlm
