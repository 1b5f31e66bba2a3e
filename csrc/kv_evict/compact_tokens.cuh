// SPDX-License-Identifier: Apache-2.0
// Device code of `compact_tokens`.
//
// Rows move towards the front, and front rows are sources too. A thread block loads a whole chunk of rows
// into registers before it writes any of them. Sources lie at or behind their targets, so a row is only
// overwritten by a chunk at or behind the one that reads it: chunks must be loaded in order, then nothing is
// lost, and every byte is read and written once. There are two ways to keep that order:
// - Narrow columns of the rows, each moved by one block from its first chunk to its last. Blocks do not wait
//   for each other. Taken wherever there are columns enough to fill a GPU.
// - One block a chunk. It says when it has loaded, and writes only when every chunk before its own has been
//   loaded. Blocks take their chunks by ticket, so a block only ever waits for blocks that already run.
#pragma once

#include "common/ptx.cuh"
#include "kv_evict/compact_tokens.h"

namespace livevlm {

inline constexpr int kCompactThreads = 256;
inline constexpr int kPiecesPerThread = 8;  // loaded before the first is written

// How one tensor is cut. A lane is what moves independently: one segment of the columns of one (batch, head).
struct CompactPlan {
  uint32_t segment_pieces;  // of a row, at most one a thread
  uint32_t rows_per_pass;   // that the block's threads cover at once
  uint32_t num_segments, num_lanes;
  uint32_t num_blocks;   // of a lane: 1, or as many as it has chunks
  int64_t first_ticket;  // also the index of the first flag: one flag a chunk

  int64_t num_tickets() const { return int64_t{num_lanes} * num_blocks; }
};

// `segment_bytes`: the width of columns that are one block's, or 0 for one block a chunk.
inline CompactPlan plan_compaction(const Rows& rows, int64_t batch_heads, int64_t num_kept,
                                   int64_t segment_bytes, int64_t first_ticket) {
  CompactPlan plan;
  const auto most = static_cast<uint32_t>(segment_bytes ? segment_bytes / rows.unit : kCompactThreads);
  const auto units = static_cast<uint32_t>(rows.num_units);
  plan.segment_pieces = units < most ? units : most;
  plan.rows_per_pass = static_cast<uint32_t>(kCompactThreads) / plan.segment_pieces;
  plan.num_segments = (units + plan.segment_pieces - 1) / plan.segment_pieces;
  plan.num_lanes = static_cast<uint32_t>(batch_heads) * plan.num_segments;
  const int64_t rows_per_chunk = int64_t{plan.rows_per_pass} * kPiecesPerThread;
  plan.num_blocks =
      segment_bytes ? 1 : static_cast<uint32_t>((num_kept + rows_per_chunk - 1) / rows_per_chunk);
  plan.first_ticket = first_ticket;
  return plan;
}

// States of a chunk's flag.
inline constexpr uint32_t kLoaded = 1;     // its own rows are in registers
inline constexpr uint32_t kAllLoaded = 2;  // and so are those of all chunks before it

// Waits, with one warp, until all chunks of a lane before `chunk` are loaded.
__device__ __forceinline__ void wait_for_earlier_chunks(const uint32_t* flags, int64_t chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int64_t newest = chunk - 1;  // chunks behind it are known to be loaded
  while (newest >= 0) {
    const int64_t mine = newest - lane;
    const uint32_t state = mine >= 0 ? load_acquire(flags + mine) : kAllLoaded;
    const uint32_t loaded = __ballot_sync(~0u, state >= kLoaded);
    const uint32_t all_loaded = __ballot_sync(~0u, state == kAllLoaded);
    const uint32_t until =
        all_loaded ? (all_loaded & -all_loaded) - 1 : ~0u;  // lanes before the first such chunk
    if ((loaded & until) != until) continue;
    if (all_loaded) return;
    newest -= 32;
  }
}

// One segment of the columns of one (batch, head).
struct Lane {
  char* base;              // its first row
  const int32_t* indices;  // of the (batch, head)
  uint32_t segment;
  uint32_t* flags;  // null if one block has all chunks
};

// Moves one chunk of a lane, or all of them. A thread has one column, and every plan.rows_per_pass-th row.
template <typename Piece>
__device__ __forceinline__ void move_rows(const Rows& rows, const Lane& lane, const CompactPlan& plan,
                                          uint32_t chunk, const CompactTokens& op) {
  const uint32_t pass = threadIdx.x / plan.segment_pieces, step = plan.rows_per_pass * kPiecesPerThread;
  const uint32_t column = lane.segment * plan.segment_pieces + threadIdx.x - pass * plan.segment_pieces;
  const uint32_t begin = chunk * step, num_kept = static_cast<uint32_t>(op.num_kept);
  const uint32_t end = lane.flags ? min(begin + step, num_kept) : num_kept;
  const bool inside = pass < plan.rows_per_pass && column < rows.num_units;
  const uint32_t end_of_thread = inside ? end : 0;
  char* own = lane.base + piece_offset(rows, inside ? column : 0);
  for (uint32_t base = begin; base < end; base += step) {  // all threads of the block come along
    int32_t sources[kPiecesPerThread];  // all before the first piece, which would wait for its own
    uint32_t row = base + pass;
#pragma unroll
    for (int i = 0; i < kPiecesPerThread; ++i, row += plan.rows_per_pass) {
      sources[i] = row < end_of_thread ? lane.indices[row] : -1;
    }
    Piece pieces[kPiecesPerThread];
    uint32_t moves = 0;  // bit i: piece i does
    row = base + pass;
#pragma unroll
    for (int i = 0; i < kPiecesPerThread; ++i, row += plan.rows_per_pass) {
      if (sources[i] < 0 || sources[i] >= op.seq_len || sources[i] == static_cast<int32_t>(row)) continue;
      moves |= 1u << i;
      // Not through the read-only path: this memory is written by the same kernel.
      const auto* source = reinterpret_cast<const Piece*>(own + sources[i] * rows.stride_token);
      pieces[i] = __ldcg(source);
    }
    __syncthreads();
    if (lane.flags) {
      if (threadIdx.x < 32) {
        if (threadIdx.x == 0) store_release(lane.flags + chunk, kLoaded);
        wait_for_earlier_chunks(lane.flags, chunk);
        if (threadIdx.x == 0) store_release(lane.flags + chunk, kAllLoaded);
      }
      __syncthreads();
    }
    auto* target = own + (base + pass) * rows.stride_token;
#pragma unroll
    for (int i = 0; i < kPiecesPerThread; ++i, target += plan.rows_per_pass * rows.stride_token) {
      if (moves >> i & 1) *reinterpret_cast<Piece*>(target) = pieces[i];
    }
  }
}

// What `place` (a ticket less the tensor's first) names. Lanes take turns, so that blocks that run at the
// same time seldom wait for each other.
__device__ __forceinline__ void move_place(const Rows& rows, const CompactPlan& plan, const CompactTokens& op,
                                           uint32_t place, uint32_t* flags) {
  const uint32_t chunk = place / plan.num_lanes, number = place % plan.num_lanes;
  const uint32_t batch_head = number / plan.num_segments;
  const int64_t batch = batch_head / static_cast<uint32_t>(op.num_heads),
                head = batch_head - batch * op.num_heads;
  const Lane lane{
      .base = rows.data + batch * rows.stride_batch + head * rows.stride_head,
      .indices = op.indices + int64_t{batch_head} * op.num_kept,
      .segment = number % plan.num_segments,
      .flags = plan.num_blocks > 1 ? flags + plan.first_ticket + int64_t{number} * plan.num_blocks : nullptr,
  };
  switch (rows.unit) {
    case 16:
      return move_rows<uint4>(rows, lane, plan, chunk, op);
    case 8:
      return move_rows<uint2>(rows, lane, plan, chunk, op);
    case 4:
      return move_rows<unsigned int>(rows, lane, plan, chunk, op);
    case 2:
      return move_rows<unsigned short>(rows, lane, plan, chunk, op);
    default:
      return move_rows<unsigned char>(rows, lane, plan, chunk, op);
  }
}

// The next ticket, the same for all threads of the block.
__device__ __forceinline__ int64_t take_ticket(uint32_t* counter) {
  __shared__ uint32_t ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(counter, 1u);
  __syncthreads();
  return ticket;
}

}  // namespace livevlm
