// SPDX-License-Identifier: Apache-2.0
// A warp's own keys and values on their way from the pool, for attend_mma.cuh: 16 at a time, in a ring of
// steps in shared memory that cp.async fills in the background.
#pragma once

#include "block_attention/angles.cuh"

namespace livevlm {

// Where a piece of 16 bytes of a row lies. Eight threads that read at once must find different banks: of
// keys, four neighbouring pieces of two rows; of values, two pieces of every second row.
__device__ __forceinline__ uint32_t key_piece(uint32_t row, uint32_t piece) {
  return piece ^ (row & 1) << 2;
}

__device__ __forceinline__ uint32_t value_piece(uint32_t row, uint32_t piece) {
  return piece ^ (row & 6);
}

// The lane, in a way that keeps the compiler from carrying all addresses that follow from it through a loop,
// in registers that it does not have.
__device__ __forceinline__ uint32_t lane_again() {
  uint32_t lane = threadIdx.x % 32;
  asm volatile("" : "+r"(lane));
  return lane;
}

// Where a key and its value lie, in pieces of 16 bytes from their head's start; and its row of angles. These
// come from another load, for which keys and values do not wait: an empty slot's are brought, too.
struct KeyPieces {
  static constexpr uint32_t kNothing = ~0u;
  uint32_t k, v;   // kNothing: outside of the pool, or not seen
  int32_t angles;  // negative: an empty slot
};

// Which of 16 keys are there, and which have a place in the pool that is empty; a bit each.
struct KeyBits {
  uint32_t present, empty;

  __device__ __forceinline__ explicit KeyBits(const KeyPieces& own) {
    const bool somewhere = own.k != KeyPieces::kNothing;
    present = __ballot_sync(~0u, somewhere && own.angles >= 0) & 0xffff;
    empty = __ballot_sync(~0u, somewhere && own.angles < 0) & 0xffff;
  }
};

template <typename T, int kDim>
struct KeyRing {
  static constexpr int kRow = kDim * 2, kValues = kStepKeys * kRow, kStepBytes = 2 * kValues;
  static constexpr int kBytes = 2 * kStepBytes;
  static constexpr uint32_t kPieces = kRow / 16, kRows = 32 / kPieces;  // of a row; of a warp at once

  // The first dimension of word i of a key, or a query, that a lane has.
  static __device__ __forceinline__ int first_dim(int lane, int i) { return lane % 4 * 8 + i * 32; }

  const AttentionKernel& p;
  const int32_t* table;
  const T *k, *v;      // of the head, and the lane's piece of a row
  char* memory;        // of the warp
  int32_t begin, end;  // of the keys that are seen
  KeyPieces own;       // key lane % 16 of the next step to be brought

  __device__ __forceinline__ KeyRing(const AttentionKernel& p, const RowTile& tile, int64_t head, int32_t end,
                                     char* memory)
      : p(p),
        table(table_of(p.op, tile.sequence.index, head)),
        k(static_cast<const T*>(p.op.k.data) + head * p.op.k.stride_head + threadIdx.x % kPieces * 8),
        v(static_cast<const T*>(p.op.v.data) + head * p.op.v.stride_head + threadIdx.x % kPieces * 8),
        memory(memory),
        begin(tile.keys.begin),
        end(end) {
    asm volatile("" : "+l"(k), "+l"(v));  // computed once
  }

  __device__ __forceinline__ void look_up(int32_t first) {
    const int32_t key = first + static_cast<int>(threadIdx.x) % kStepKeys;
    const KeySlot at = slot_of(p, table, key, end);
    own = {KeyPieces::kNothing, 0, 0};
    if (at.block < 0 || key < begin) return;
    const auto block = static_cast<uint32_t>(at.block), slot = static_cast<uint32_t>(at.slot);
    own = {block * p.k_block + slot * p.k_slot, block * p.v_block + slot * p.v_slot,
           angles_of(p.op, at, key)};
  }

  // Brings the 16 keys last looked up, from key `first` on; zeros for those that are nowhere. A group of
  // copies in any case.
  __device__ __forceinline__ void bring(int step, int32_t first) {
    if (first < end) copy(step);
    cp_async_commit();
  }

  __device__ __forceinline__ void copy(int step) {
    const uint32_t lane = lane_again();
    char* const target = memory + step * kStepBytes;
    const uint32_t piece = lane % kPieces;
#pragma unroll
    for (uint32_t i = 0; i < kStepKeys / kRows; ++i) {
      const uint32_t row = i * kRows + lane / kPieces;
      const uint32_t at_k = __shfl_sync(~0u, own.k, row), at_v = __shfl_sync(~0u, own.v, row);
      const bool there = at_k != KeyPieces::kNothing;
      cp_async16(target + row * kRow + key_piece(row, piece) * 16, k + uint64_t{there ? at_k : 0} * 8, there);
      cp_async16(target + kValues + row * kRow + value_piece(row, piece) * 16, v + uint64_t{at_v} * 8, there);
    }
  }

  // Values in empty slots become zeros, so that they do not matter. Bit i of `empty`: key i.
  __device__ __forceinline__ void clear_values(int step, uint32_t empty) const {
    const uint32_t lane = lane_again();
    char* const values = memory + step * kStepBytes + kValues;
    for (uint32_t i = lane; i < kStepKeys * kPieces; i += 32) {
      if (empty >> i / kPieces & 1) *reinterpret_cast<uint4*>(values + i * 16) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
  }

  // Key lane / 4 + 8 * `upper`, in pieces of 8 elements, 32 apart, the first from lane % 4 * 8 on.
  __device__ __forceinline__ void key(int step, int upper, uint4 (&words)[kDim / 32]) const {
    const uint32_t lane = lane_again(), row = lane / 4 + upper * 8;
    const char* const source = memory + step * kStepBytes + row * kRow;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i)
      words[i] = *reinterpret_cast<const uint4*>(source + key_piece(row, lane % 4 + i * 4) * 16);
  }

  // Dimensions lane / 4 * 8 to + 7, from 64 `half` on, of the values of keys lane % 4 * 2 + {0, 1, 8, 9}.
  __device__ __forceinline__ void values(int step, int half, uint4 (&words)[4]) const {
    const uint32_t lane = lane_again();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = lane % 4 * 2 + i % 2 + i / 2 * 8;
      words[i] = *reinterpret_cast<const uint4*>(memory + step * kStepBytes + kValues + row * kRow +
                                                 value_piece(row, lane / 4 + half * 8) * 16);
    }
  }
};

}  // namespace livevlm
