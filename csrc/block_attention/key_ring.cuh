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

// Where a key and its value lie, in pieces of 16 bytes from their head's start; and its row of angles.
struct KeyPieces {
  static constexpr uint32_t kNothing = ~0u;
  uint32_t k, v;  // kNothing: there is nothing to see
  int32_t angles;
};

template <typename T, int kDim>
struct KeyRing {
  static constexpr int kRow = kDim * 2, kValues = kStepKeys * kRow, kStepBytes = 2 * kValues;
  static constexpr int kBytes = 2 * kStepBytes;
  static constexpr uint32_t kPieces = kRow / 16, kRows = 32 / kPieces;  // of a row; of a warp at once

  const AttentionKernel& p;
  const int32_t* table;
  const T *k, *v;  // of the head, and the lane's piece of a row
  char* memory;    // of the warp
  int32_t end;
  KeyPieces own;        // key lane % 16 of the next step to be brought
  uint32_t present[2];  // bit i: key i of a step is there

  __device__ __forceinline__ KeyRing(const AttentionKernel& p, const RowTile& tile, int64_t head, int32_t end,
                                     char* memory)
      : p(p),
        table(table_of(p.op, tile.sequence.index, head)),
        k(static_cast<const T*>(p.op.k.data) + head * p.op.k.stride_head + threadIdx.x % kPieces * 8),
        v(static_cast<const T*>(p.op.v.data) + head * p.op.v.stride_head + threadIdx.x % kPieces * 8),
        memory(memory),
        end(end) {
    asm volatile("" : "+l"(k), "+l"(v));  // computed once
  }

  __device__ __forceinline__ void look_up(int32_t first) {
    const KeyPlace place = place_of(p, table, first + static_cast<int>(threadIdx.x) % kStepKeys, end);
    const auto block = static_cast<uint32_t>(place.block), slot = static_cast<uint32_t>(place.slot);
    own = {block * p.k_block + slot * p.k_slot, block * p.v_block + slot * p.v_slot, place.angles};
    if (place.block < 0) own.k = KeyPieces::kNothing, own.v = 0;
  }

  // Brings the 16 keys last looked up. Those that are not there become zeros; what is in their place is not
  // read.
  __device__ __forceinline__ void bring(int step) {
    const uint32_t lane = lane_again();
    char* const target = memory + step * kStepBytes;
    const uint32_t bits = __ballot_sync(~0u, own.k != KeyPieces::kNothing) & 0xffff;
    present[0] = step ? present[0] : bits,
    present[1] = step ? bits : present[1];  // an index would need memory
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

  __device__ __forceinline__ uint32_t present_at(int step) const { return step ? present[1] : present[0]; }

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
