// SPDX-License-Identifier: Apache-2.0
// `block_attention` on Hopper for questions: where the keys lie that a warp of gather_tiles.cuh brings,
// loaded two rounds ahead: entries of the table, then blocks and positions.
#pragma once

#include "block_attention/tile_rows.cuh"

namespace livevlm {

// Keys that a warp brings, kOwn of a tile, of as many tiles as it has lanes for: a round.
template <typename C>
struct KeyFinder {
  static constexpr int kOwn = C::kKeys / (4 * C::kBringers), kTiles = 32 / kOwn, kNext = kTiles * C::kKeys;

  const TileAttention& p;
  const int32_t* table;
  Range keys;   // that some row of the block sees; others are not there
  int32_t key;  // this lane's, in this round
  // Of this round and the next: block and position, as they are loaded. Of the one after: the block.
  int32_t block, next_block, far_block;
  int64_t position, next_position;
  uint32_t k_at, v_at;  // in pieces of 16 bytes

  __device__ __forceinline__ KeyFinder(const TileAttention& p, const TileWork& work, int warp, int lane)
      : p(p), table(table_of(p.op, work.tile.sequence.index, work.head)), keys(work.keys) {
    key = work.first_tile * C::kKeys + lane / kOwn * C::kKeys + warp * kOwn + lane % kOwn;
    // All that can be under way together is.
    block = entry_of(key);
    next_block = entry_of(key + kNext);
    far_block = entry_of(key + 2 * kNext);
    position = position_of(block, key);
    next_position = position_of(next_block, key + kNext);
    place();
  }

  __device__ __forceinline__ void next() {
    key += kNext;
    block = next_block, position = next_position;
    place();
    next_block = far_block;
    next_position = position_of(next_block, key + kNext);
    far_block = entry_of(key + 2 * kNext);
  }

  __device__ __forceinline__ bool in_pool() const { return block_exists(block); }
  __device__ __forceinline__ bool there() const { return position >= 0; }
  __device__ __forceinline__ int32_t angles() const {
    return static_cast<int32_t>(angle_row(p.op, p.op.packed ? key : position));
  }

 private:
  __device__ __forceinline__ void place() {
    const auto in = static_cast<uint32_t>(in_pool() ? block : 0);
    k_at = in * p.k_block + slot_of(key) * p.k_slot;
    v_at = in * p.v_block + slot_of(key) * p.v_slot;
  }
  __device__ __forceinline__ bool block_exists(int32_t of) const {
    return static_cast<uint32_t>(of) < static_cast<uint64_t>(p.op.num_blocks);
  }
  __device__ __forceinline__ int32_t entry_of(int32_t of) const {
    if (of < keys.begin || of >= keys.end) return -1;
    return table[p.block_size.quotient(static_cast<uint32_t>(of))];
  }
  __device__ __forceinline__ uint32_t slot_of(int32_t of) const {
    const auto number = static_cast<uint32_t>(of);
    return number - p.block_size.quotient(number) * p.block_size.value;
  }
  // Negative: nothing to see.
  __device__ __forceinline__ int64_t position_of(int32_t block, int32_t of) const {
    const BlockAttention& op = p.op;
    if (!block_exists(block)) return -1;
    if (!op.positions) return of;
    const int64_t at = block * op.block_size + slot_of(of);
    if (op.positions_int64) return static_cast<const int64_t*>(op.positions)[at];
    return static_cast<const int32_t*>(op.positions)[at];
  }
};

}  // namespace livevlm
