// SPDX-License-Identifier: Apache-2.0
// `block_attention` for many rows, first step: keys and values of every sequence as tiles that can be copied
// into shared memory byte for byte, in the order in which products read them (common/wgmma_tiles.cuh).
//
// Clips have thousands of rows, which all read the same keys: finding, rotating and rearranging them once per
// row tile would cost more than the products. A tile holds kKeys neighbours in table order, tile t those from
// t * kKeys on. A key that nobody may see is a row of zeros, so that what lies in its slot, NaN perhaps,
// cannot reach a sum; a bit says whether it is there.
#pragma once

#include "block_attention/angles.cuh"
#include "block_attention/codes.cuh"

namespace livevlm {

inline constexpr int kImageThreads = 256;

// Of a tile: a bit for each key, set if it can be seen or if the tile has no such key; the last word is not
// 0 if a bit is not set.
inline constexpr int kPresentWords = 8, kSomeHidden = kPresentWords - 1;

// [batch, num_heads, max_tiles]
struct TileAttention : AttentionKernel {
  unsigned char* images;  // of each tile: the keys, then the values
  uint32_t* present;      // [kPresentWords]
  int32_t max_tiles;
  int32_t num_items;                // of tiles of rows and their splits, for a KV head
  Divisor items_each, splits_each;  // of a sequence, without cu_seqlens_q

  __device__ __forceinline__ int64_t tile_index(int32_t sequence, int32_t head, int32_t tile) const {
    return (sequence * op.num_heads + head) * max_tiles + tile;
  }
};

// Where 16 bytes of a row lie in an image of kRows rows: see common/wgmma_tiles.cuh.
template <int kRows>
__device__ __forceinline__ int image_offset(int row, int piece) {
  return piece / 8 * (kRows * 128) + row * 128 + (piece % 8 ^ row % 8) * 16;
}

// A block makes one tile of one head. kCodes: of a quantised pool.
template <typename T, int kDim, int kKeys, bool kCodes = false>
__global__ void __launch_bounds__(kImageThreads, 4)
    tile_images_kernel(const __grid_constant__ TileAttention p) {
  static_assert(kKeys <= 32 * kSomeHidden && kKeys % 16 == 0, "a bit for each key; products of 16 keys");
  constexpr int kPieces = kDim / 16;  // of 16 bytes, of half a row
  constexpr int kItems = kKeys * kPieces, kImageBytes = kKeys * kDim * 2, kAhead = kCodes ? 1 : 2;
  __shared__ int32_t blocks[kKeys], slots[kKeys], angles[kKeys];
  __shared__ uint32_t words[kPresentWords];
  const BlockAttention& op = p.op;
  const int thread = static_cast<int>(threadIdx.x);
  const auto heads = static_cast<uint32_t>(op.num_heads), max_tiles = static_cast<uint32_t>(p.max_tiles);
  const uint32_t unit = blockIdx.x / max_tiles;
  const auto tile = static_cast<int32_t>(blockIdx.x % max_tiles), head = static_cast<int32_t>(unit % heads);
  const Sequence sequence(p, static_cast<int32_t>(unit / heads));
  const int64_t rows = sequence.num_rows(op);
  if (rows == 0 || rows < p.min_rows || rows > p.max_rows) return;         // left to another kernel
  const int32_t begin = sequence.seen(op, 0).begin, first = tile * kKeys;  // before a window: not seen
  if (first >= sequence.num_keys || first + kKeys <= begin) return;

  if (thread < kPresentWords) words[thread] = ~0u;
  __syncthreads();
  const int32_t* const table = table_of(op, sequence.index, head);
  for (int i = thread; i < (kKeys + 31) / 32 * 32; i += kImageThreads) {  // whole warps
    bool there = true;
    if (i < kKeys) {
      const KeyPlace place = place_of(p, table, first + i, sequence.num_keys);
      there = place.block >= 0 && first + i >= begin;
      blocks[i] = there ? place.block : -1;
      slots[i] = place.slot;
      angles[i] = place.angles;
    }
    const uint32_t word = __ballot_sync(~0u, there);
    if (thread % 32 == 0) words[i / 32] = word;
  }
  __syncthreads();
  const int64_t index = p.tile_index(sequence.index, head, tile);
  if (thread < kPresentWords) {
    uint32_t word = words[thread];
    if (thread == kSomeHidden) {
      for (int i = 0; i < kSomeHidden; ++i) word &= words[i];
      word = ~word;
    }
    p.present[index * kPresentWords + thread] = word;
  }

  // K and V of kAhead items are under way together.
  unsigned char* const image = p.images + index * (2 * kImageBytes);
  const T* const keys = static_cast<const T*>(op.k.data) + head * op.k.stride_head;
  const T* const values = static_cast<const T*>(op.v.data) + head * op.v.stride_head;
  for (int item = thread; item < kItems; item += kAhead * kImageThreads) {
    uint4 k[kAhead][2], v[kAhead][2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int key = (item + i * kImageThreads) / kPieces, piece = item % kPieces * 8;
      k[i][0] = k[i][1] = v[i][0] = v[i][1] = make_uint4(0, 0, 0, 0);
      if (key >= kKeys || blocks[key] < 0) continue;
      if constexpr (kCodes) {
        code_eights<T>(op, true, blocks[key], slots[key], head, piece, k[i][0], k[i][1]);
        code_eights<T>(op, false, blocks[key], slots[key], head, piece, v[i][0], v[i][1]);
        continue;
      }
      const T* from = keys + blocks[key] * op.k.stride_batch + slots[key] * op.k.stride_token + piece;
      k[i][0] = load_once(reinterpret_cast<const uint4*>(from));
      k[i][1] = load_once(reinterpret_cast<const uint4*>(from + kDim / 2));
      from = values + blocks[key] * op.v.stride_batch + slots[key] * op.v.stride_token + piece;
      v[i][0] = load_once(reinterpret_cast<const uint4*>(from));
      v[i][1] = load_once(reinterpret_cast<const uint4*>(from + kDim / 2));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int key = (item + i * kImageThreads) / kPieces, piece = item % kPieces;
      if (key >= kKeys) continue;
      if (op.cos_sin_cache && blocks[key] >= 0)
        rotate_by_table<T>(op, angles[key], piece * 8, k[i][0], k[i][1]);
      unsigned char* const low = image + image_offset<kKeys>(key, piece);
      unsigned char* const high = image + image_offset<kKeys>(key, piece + kPieces);
      *reinterpret_cast<uint4*>(low) = k[i][0];
      *reinterpret_cast<uint4*>(high) = k[i][1];
      *reinterpret_cast<uint4*>(low + kImageBytes) = v[i][0];
      *reinterpret_cast<uint4*>(high + kImageBytes) = v[i][1];
    }
  }
}

}  // namespace livevlm
