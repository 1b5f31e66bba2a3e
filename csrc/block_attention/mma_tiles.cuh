// SPDX-License-Identifier: Apache-2.0
// `block_attention` for many rows without warpgroup products: tiles in shared memory, as tile_images.cuh has
// them, and the products of a warp with them.
#pragma once

#include "block_attention/key_ring.cuh"
#include "block_attention/tile_rows.cuh"

namespace livevlm {

// A warp has kSixteens * 16 rows; with two, it reads a key from shared memory once for 32 of them.
template <typename Element, int kHeadDim, int kSixteens, int kRing, bool kGather>
struct MmaTiles {
  using T = Element;
  static constexpr int kDim = kHeadDim, kKeys = 64, kParts16 = kSixteens, kStages = kRing;
  static constexpr bool kUsesWarpgroups = false;
  static constexpr bool kGathers = kGather;  // tiles come straight from the pool: pool_tiles.cuh
  static constexpr int kBringers = 1;        // all four warps
  static constexpr int kThreads = 128, kRows = 64 * kParts16;
  // Shared memory. Images are multiples of 1024 bytes.
  static constexpr int kImageBytes = kKeys * kDim * 2, kQueryBytes = 64 * kDim * 2;
  static constexpr int kPresentBytes = kPresentWords * 4;
  static constexpr int kKeysAt = kParts16 * kQueryBytes, kValuesAt = kKeysAt + kStages * kImageBytes;
  static constexpr int kPresentAt = kValuesAt + kStages * kImageBytes;
  static constexpr int kLimitsAt = kPresentAt + kStages * kPresentBytes;  // Range: keys that a row sees
  static constexpr int kWorkAt = kLimitsAt + kRows * 8, kSumsAt = kWorkAt + kWorkBytes;
  // float2: sums of the rows of a thread, which has no registers for those of 32.
  static constexpr bool kKeepsSums = kParts16 == 2;
  static constexpr int kSharedBytes = kSumsAt + (kKeepsSums ? 2 * kThreads * 8 : 0);
  static_assert(2 * (kSharedBytes + 1024) <= 164 * 1024, "two thread blocks for a multiprocessor of an A100");
};

// Tiles from images.
template <typename C>
struct ImageTiles {
  const TileAttention& p;
  const TileWork& work;
  unsigned char* memory;

  __device__ __forceinline__ ImageTiles(const TileAttention& p, const TileWork& work, unsigned char* memory)
      : p(p), work(work), memory(memory) {}

  // In the background; nothing past the last tile.
  __device__ __forceinline__ void bring_keys(int32_t tile) const {
    if (tile >= work.num_tiles) return;
    const int stage = tile % C::kStages, thread = static_cast<int>(threadIdx.x);
    copy(memory + C::kKeysAt + stage * C::kImageBytes, image_of(tile));
    if (thread < C::kPresentBytes / 16)
      cp_async16(memory + C::kPresentAt + stage * C::kPresentBytes + thread * 16,
                 p.present + index_of(tile) * kPresentWords + thread * 4, true);
  }
  __device__ __forceinline__ void bring_values(int32_t tile) const {
    if (tile >= work.num_tiles) return;
    copy(memory + C::kValuesAt + tile % C::kStages * C::kImageBytes, image_of(tile) + C::kImageBytes);
  }
  __device__ __forceinline__ void load_angles(int32_t) const {}
  __device__ __forceinline__ void rotate(int32_t) const {}

 private:
  __device__ __forceinline__ int64_t index_of(int32_t tile) const {
    return p.tile_index(work.tile.sequence.index, work.head, work.first_tile + tile);
  }
  __device__ __forceinline__ const unsigned char* image_of(int32_t tile) const {
    return p.images + index_of(tile) * (2 * C::kImageBytes);
  }
  __device__ __forceinline__ void copy(unsigned char* target, const unsigned char* image) const {
#pragma unroll
    for (int i = 0; i < C::kImageBytes; i += C::kThreads * 16)
      cp_async16(target + i + threadIdx.x * 16, image + i + threadIdx.x * 16, true);
  }
};

// Where in 16 rows of a panel (common/wgmma_tiles.cuh) a lane's 16 bytes for load_matrices lie: matrices 0
// and 1 are the upper and the lower rows, 2 and 3 the same of the next eight columns.
__device__ __forceinline__ int rows_first(int lane) {
  return lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
}

// The same with matrices 1 and 2 exchanged.
__device__ __forceinline__ int columns_first(int lane) {
  return (lane / 16 * 8 + lane % 8) * 128 + (lane / 8 % 2 ^ lane % 8) * 16;
}

// The same of 16 columns `step`, from the place in the first 16: an exclusive or, as panels are swizzled.
__device__ __forceinline__ int columns_at(int place, int step) {
  return step / 4 * (64 * 128) + (place ^ step % 4 * 32);
}

// Of a row and eight columns, as mma_m16n8k16 has them; see TileSums.
__device__ __forceinline__ float (&fragment(float* values, int n))[4] {
  return *reinterpret_cast<float (*)[4]>(values + 4 * n);
}

// The queries of a warp times the keys of a tile. Lanes are looked up anew, here and below: what follows from
// them would be carried through the loop over tiles in registers that are not there.
template <typename C>
__device__ __forceinline__ void multiply_keys(float (&logits)[C::kParts16][C::kKeys / 2],
                                              const unsigned char* queries, const unsigned char* keys) {
  const auto lane = static_cast<int>(lane_again());
  const int of_queries = rows_first(lane), of_keys = columns_first(lane);
#pragma unroll
  for (int step = 0; step < C::kDim / 16; ++step) {
    uint32_t rows[C::kParts16][4];
#pragma unroll
    for (int m = 0; m < C::kParts16; ++m)
      load_matrices(rows[m], queries + m * (16 * 128) + columns_at(of_queries, step));
#pragma unroll
    for (int n = 0; n < C::kKeys / 16; ++n) {
      uint32_t columns[4];
      load_matrices(columns, keys + n * (16 * 128) + columns_at(of_keys, step));
#pragma unroll
      for (int m = 0; m < C::kParts16; ++m) {
        mma_m16n8k16(fragment(logits[m], 2 * n), rows[m], {columns[0], columns[1]}, TypeTag<typename C::T>{});
        mma_m16n8k16(fragment(logits[m], 2 * n + 1), rows[m], {columns[2], columns[3]},
                     TypeTag<typename C::T>{});
      }
    }
  }
}

// Adds the values of a tile times weights.
template <typename C>
__device__ __forceinline__ void multiply_values(float (&sums)[C::kParts16][C::kDim / 2],
                                                const uint32_t (&weights)[C::kParts16][C::kKeys / 16][4],
                                                const unsigned char* values) {
  const int of_values = rows_first(static_cast<int>(lane_again()));
#pragma unroll
  for (int step = 0; step < C::kKeys / 16; ++step) {
#pragma unroll
    for (int n = 0; n < C::kDim / 16; ++n) {
      uint32_t columns[4];
      load_matrices_transposed(columns, values + step * (16 * 128) + columns_at(of_values, n));
#pragma unroll
      for (int m = 0; m < C::kParts16; ++m) {
        mma_m16n8k16(fragment(sums[m], 2 * n), weights[m][step], {columns[0], columns[1]},
                     TypeTag<typename C::T>{});
        mma_m16n8k16(fragment(sums[m], 2 * n + 1), weights[m][step], {columns[2], columns[3]},
                     TypeTag<typename C::T>{});
      }
    }
  }
}

}  // namespace livevlm
