// SPDX-License-Identifier: Apache-2.0
// Device code of `compact_tokens`.
//
// Rows move towards the front, and front rows are sources too. A thread block moves one chunk of rows: it
// loads the whole chunk into registers, says so, and writes only when every chunk before its own has been
// loaded. Sources lie at or behind their targets, so a row is only overwritten by a chunk at or behind the
// one that reads it: nothing is lost, and every byte is read and written once. Blocks take their chunks by
// ticket, so a block only ever waits for blocks that already run.
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
  uint32_t num_segments, num_lanes, num_chunks;
  int64_t first_ticket;  // also the index of the first flag: one flag a chunk

  int64_t num_tickets() const { return int64_t{num_lanes} * num_chunks; }
};

inline CompactPlan plan_compaction(const Rows& rows, int64_t batch_heads, int64_t num_kept,
                                   int64_t first_ticket) {
  CompactPlan plan;
  const auto threads = static_cast<uint32_t>(kCompactThreads), units = static_cast<uint32_t>(rows.num_units);
  plan.segment_pieces = units < threads ? units : threads;
  plan.rows_per_pass = threads / plan.segment_pieces;
  plan.num_segments = (units + plan.segment_pieces - 1) / plan.segment_pieces;
  plan.num_lanes = static_cast<uint32_t>(batch_heads) * plan.num_segments;
  const int64_t rows_per_chunk = int64_t{plan.rows_per_pass} * kPiecesPerThread;
  plan.num_chunks = static_cast<uint32_t>((num_kept + rows_per_chunk - 1) / rows_per_chunk);
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

// Moves one chunk of one lane. `indices` are those of the lane's (batch, head), `base` is its first row. A
// thread has one column, and every plan.rows_per_pass-th row.
template <typename Piece>
__device__ __forceinline__ void move_chunk(const Rows& rows, char* base, const int32_t* indices,
                                           int64_t num_kept, int64_t seq_len, const CompactPlan& plan,
                                           uint32_t segment, uint32_t chunk, uint32_t* flags) {
  const uint32_t pass = threadIdx.x / plan.segment_pieces;
  const uint32_t column = segment * plan.segment_pieces + threadIdx.x - pass * plan.segment_pieces;
  const int64_t first = int64_t{chunk} * plan.rows_per_pass * kPiecesPerThread + pass;
  const bool inside = pass < plan.rows_per_pass && column < rows.num_units;
  char* own = base + piece_offset(rows, inside ? column : 0);
  Piece pieces[kPiecesPerThread];
  uint32_t moves = 0;  // bit i: piece i does
#pragma unroll
  for (int i = 0; i < kPiecesPerThread; ++i) {
    const int64_t row = first + i * plan.rows_per_pass;
    if (!inside || row >= num_kept) continue;
    const int64_t source = __ldg(indices + row);
    if (source < 0 || source >= seq_len || source == row) continue;
    moves |= 1u << i;
    // Not through the read-only path: this memory is written by the same kernel.
    pieces[i] = __ldcg(reinterpret_cast<const Piece*>(own + source * rows.stride_token));
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) store_release(flags + chunk, kLoaded);
    wait_for_earlier_chunks(flags, chunk);
    if (threadIdx.x == 0) store_release(flags + chunk, kAllLoaded);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPiecesPerThread; ++i) {
    const int64_t row = first + i * plan.rows_per_pass;
    if (moves >> i & 1) *reinterpret_cast<Piece*>(own + row * rows.stride_token) = pieces[i];
  }
}

// The chunk that `place` (a ticket less the tensor's first) names. Lanes take turns, so that blocks that run
// at the same time seldom wait for each other.
__device__ __forceinline__ void compact_chunk(const Rows& rows, const CompactPlan& plan,
                                              const int32_t* indices, int64_t num_heads, int64_t num_kept,
                                              int64_t seq_len, uint32_t place, uint32_t* flags) {
  const auto lanes = static_cast<uint32_t>(plan.num_lanes),
             segments = static_cast<uint32_t>(plan.num_segments);
  const uint32_t chunk = place / lanes, lane = place % lanes;
  const uint32_t segment = lane % segments, batch_head = lane / segments;
  const int64_t batch = batch_head / static_cast<uint32_t>(num_heads), head = batch_head - batch * num_heads;
  char* base = rows.data + batch * rows.stride_batch + head * rows.stride_head;
  const int32_t* own = indices + int64_t{batch_head} * num_kept;
  uint32_t* own_flags = flags + plan.first_ticket + int64_t{lane} * plan.num_chunks;
  switch (rows.unit) {
    case 16:
      return move_chunk<uint4>(rows, base, own, num_kept, seq_len, plan, segment, chunk, own_flags);
    case 8:
      return move_chunk<uint2>(rows, base, own, num_kept, seq_len, plan, segment, chunk, own_flags);
    case 4:
      return move_chunk<unsigned int>(rows, base, own, num_kept, seq_len, plan, segment, chunk, own_flags);
    case 2:
      return move_chunk<unsigned short>(rows, base, own, num_kept, seq_len, plan, segment, chunk, own_flags);
    default:
      return move_chunk<unsigned char>(rows, base, own, num_kept, seq_len, plan, segment, chunk, own_flags);
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
