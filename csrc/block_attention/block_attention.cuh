// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of `block_attention` share: which rows and keys a thread block works on.
//
// A row is one query of one query head. The rows of a KV head are numbered query by query, and within a query
// head by head of the group, so that a tile of rows holds neighbouring queries, which see almost the same
// keys. The keys of a sequence are cut into splits, which are worked on at the same time; what they find is
// combined by another kernel, in a fixed order. Tiles, cuts and the choice of a kernel follow from the
// sequence alone, so that a result does not depend on what else is in the batch. Logits are in units of
// log 2.
#pragma once

#include "block_attention/block_attention.h"
#include "common/cuda_vec.cuh"
#include "common/ptx.cuh"

namespace livevlm {

// Division of numbers below 2^31 by a number that is known before the launch.
struct Divisor {
  uint32_t value, magic, shift;

  explicit Divisor(int64_t by = 1) : value(static_cast<uint32_t>(by)), shift(0) {
    while ((uint64_t{1} << shift) < value) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value + 1);
  }
#if defined(__CUDACC__) || defined(LIVEVLM_EMULATED)
  __device__ __forceinline__ uint32_t quotient(uint32_t of) const {
    return (__umulhi(of, magic) + of) >> shift;
  }
#endif
};

struct AttentionKernel {
  BlockAttention op;
  Divisor block_size;
  float scale;                 // sm_scale in units of log 2
  int32_t min_rows, max_rows;  // of a KV head: other sequences are left to another kernel
  int32_t tile_rows;
  int32_t num_tiles;    // of a KV head, at most
  int32_t tiles_each;   // of a sequence; with cu_seqlens_q: 1 if it has at most one for each query, else 0
  int32_t most_splits;  // that a sequence is cut into
  int32_t num_splits;   // of these, as many as can have keys
  int32_t together;     // neighbouring splits that are merged where they are found: 1 or kTogether
  int32_t num_found;    // of a sequence: num_splits / together, rounded up
  uint32_t k_block, k_slot, v_block, v_slot;  // strides in pieces of 16 bytes, if keys and values have such
  int64_t found_region;                       // see found_at()
  float* found_out;                           // [head_dim] each, relative to the top
  float2* found_sums;                         // top, sum of exponentials relative to it
};

// Keys of a step of a warp, and parts of a split: what is found in these is merged one after the other, and
// then that of kTogether neighbouring splits.
inline constexpr int kStepKeys = 16, kParts = 4, kTogether = 8;

// Rows of a KV head that keep a thread block busy.
inline constexpr int kManyRows = 128;

// Sequences with more rows than this go to the kernel for many rows, if there is one for this GPU.
inline constexpr int32_t kFewest = 32;

// Splits of a sequence: many rows need few of them to keep a GPU busy.
__host__ __device__ inline int64_t splits_of_rows(const AttentionKernel& p, int64_t rows) {
  if (rows <= kFewest) return p.most_splits;
  const int64_t tiles = (rows + kManyRows - 1) / kManyRows * 2;
  return p.most_splits > tiles ? p.most_splits / tiles : 1;
}

// No key yet: below every logit.
inline constexpr float kNoTop = -1e30f;

// A range of keys or splits.
struct Range {
  int32_t begin, end;
};

struct Sequence {
  int32_t index, first_query, num_queries, num_keys;

  __device__ __forceinline__ Sequence(const BlockAttention& op, int32_t index) : index(index) {
    const auto total = static_cast<int32_t>(op.total_q), batch = static_cast<int32_t>(op.batch);
    first_query = start_of(op, index, total, batch);
    num_queries = max(0, start_of(op, index + 1, total, batch) - first_query);
    const int64_t room = op.max_blocks * op.block_size;
    num_keys = static_cast<int32_t>(max(int64_t{0}, min(int64_t{op.seq_lens[index]}, room)));
  }

  static __device__ __forceinline__ int32_t start_of(const BlockAttention& op, int32_t index, int32_t total,
                                                     int32_t batch) {
    if (!op.cu_seqlens_q) return index * (total / batch);
    return max(0, min(op.cu_seqlens_q[index], total));
  }

  __device__ __forceinline__ int32_t num_rows(const BlockAttention& op) const {
    return num_queries * static_cast<int32_t>(op.group_size);
  }

  // Keys that query `query` of the sequence sees: up to the one that it is itself, the sequence's last
  // queries being its last keys.
  __device__ __forceinline__ Range seen(const BlockAttention& op, int32_t query) const {
    if (!op.causal) return {0, num_keys};
    const int32_t end = max(0, num_keys - num_queries + query + 1);
    return {op.window ? static_cast<int32_t>(max(int64_t{0}, end - op.window)) : 0, end};
  }

  __device__ __forceinline__ int32_t most_splits(const AttentionKernel& p) const {
    return static_cast<int32_t>(splits_of_rows(p, num_rows(p.op)));
  }

  // The cut into splits, each of kParts parts: the first key of split 0, and how many keys a part has.
  __device__ __forceinline__ int2 cut(const AttentionKernel& p) const {
    const int32_t first = seen(p.op, 0).begin, steps = (max(1, num_keys - first) + kStepKeys - 1) / kStepKeys;
    const int32_t parts = most_splits(p) * kParts;
    return make_int2(first, (steps + parts - 1) / parts * kStepKeys);
  }

  // The parts that hold any of these keys.
  __device__ __forceinline__ Range parts_of(const AttentionKernel& p, const Range& keys) const {
    if (keys.begin >= keys.end) return {0, 0};
    const int2 first_and_size = cut(p);
    return {(keys.begin - first_and_size.x) / first_and_size.y,
            (keys.end - 1 - first_and_size.x) / first_and_size.y + 1};
  }
};

// Rows of one sequence and KV head.
struct RowTile {
  Sequence sequence;
  int32_t first_row, num_rows;  // of the sequence's
  Range keys;                   // seen by at least one of them

  __device__ __forceinline__ RowTile(const AttentionKernel& p, const Sequence& sequence, int32_t number)
      : sequence(sequence), keys{0, 0} {
    const auto group = static_cast<int32_t>(p.op.group_size);
    const int32_t rows = sequence.num_rows(p.op);
    first_row = min(number * p.tile_rows, rows);
    num_rows = min(rows - first_row, p.tile_rows);
    if (rows < p.min_rows || rows > p.max_rows) num_rows = 0;
    if (num_rows > 0) {
      keys.begin = sequence.seen(p.op, first_row / group).begin;
      keys.end = max(keys.begin, sequence.seen(p.op, (first_row + num_rows - 1) / group).end);
    }
  }

  __device__ __forceinline__ Range seen(const BlockAttention& op, int32_t row) const {
    return sequence.seen(op, (first_row + row) / static_cast<int32_t>(op.group_size));
  }

  // The keys of a split that the tile sees.
  __device__ __forceinline__ Range keys_of(const AttentionKernel& p, int32_t split) const {
    const int2 cut = sequence.cut(p);
    const int32_t size = cut.y * kParts, first = cut.x + split * size;
    return {max(keys.begin, first), min(keys.end, first + size)};
  }

  // Row of q, out and lse, counted over all query heads.
  __device__ __forceinline__ int64_t flat_row(const BlockAttention& op, int64_t head, int32_t row) const {
    const auto group = static_cast<int32_t>(op.group_size);
    const int32_t query = (first_row + row) / group;
    return (int64_t{sequence.first_query} + query) * (op.num_heads * op.group_size) + head * op.group_size +
           (first_row + row - query * group);
  }
};

// The last of sequences 0 to batch - 1 for which `first_of`, which does not fall, is at most `value`;
// sequence 0 if there is none. By all lanes of a warp, 32 at a time: one at a time would wait for memory each
// time.
template <typename FirstOf>
__device__ __forceinline__ int32_t last_at_most(const BlockAttention& op, int32_t value, FirstOf first_of) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  int32_t low = 0, count = static_cast<int32_t>(op.batch);
  while (count > 1) {
    const int32_t step = (count + 31) / 32, probe = lane * step;
    const bool before = probe < count && first_of(low + probe) <= value;
    const int32_t found = max(__popc(__ballot_sync(~0u, before)) - 1, 0) * step;
    low += found;
    count = min(step, count - found);
  }
  return low;
}

// Number of what is found for row `row` of a sequence in its splits `found` * together and on. Without
// found_region the sequences' places follow from how many queries are before them, else each has a region.
__device__ __forceinline__ int64_t found_at(const AttentionKernel& p, const Sequence& sequence, int64_t head,
                                            int32_t row, int32_t found) {
  const int64_t start =
      p.found_region ? sequence.index * p.found_region : sequence.first_query * p.op.group_size * p.num_found;
  const int64_t splits = min(sequence.most_splits(p), p.num_splits);
  return (start + row * ((splits + p.together - 1) / p.together) + found) * p.op.num_heads + head;
}

// Tile `number` of a KV head. With cu_seqlens_q, sequence i owns the numbers from
// cu_seqlens_q[i] * group_size / tile_rows + i on, or from cu_seqlens_q[i] on if that is tighter: at least as
// many as it has tiles, and found without adding up those of the sequences before.
__device__ __forceinline__ RowTile tile_of(const AttentionKernel& p, int32_t number) {
  const auto total = static_cast<int32_t>(p.op.total_q), batch = static_cast<int32_t>(p.op.batch);
  if (!p.op.cu_seqlens_q) {
    const int32_t index = number / p.tiles_each;
    return RowTile(p, Sequence(p.op, index), number - index * p.tiles_each);
  }
  const auto group = static_cast<int32_t>(p.op.group_size);
  const auto first_of = [&](int32_t index) {
    const int32_t query = Sequence::start_of(p.op, index, total, batch);
    return p.tiles_each ? query : query * group / p.tile_rows + index;
  };
  const int32_t index = last_at_most(p.op, number, first_of);
  return RowTile(p, Sequence(p.op, index), number - first_of(index));
}

// The sequence that a query belongs to. Of no sequence: num_queries is 0.
__device__ __forceinline__ Sequence sequence_of(const BlockAttention& op, int32_t query) {
  const auto total = static_cast<int32_t>(op.total_q), batch = static_cast<int32_t>(op.batch);
  if (!op.cu_seqlens_q) return Sequence(op, query / (total / batch));
  const auto first_of = [&](int32_t index) { return Sequence::start_of(op, index, total, batch); };
  Sequence sequence(op, last_at_most(op, query, first_of));
  if (query < sequence.first_query || query >= sequence.first_query + sequence.num_queries)
    sequence.num_queries = 0;
  return sequence;
}

__device__ __forceinline__ const int32_t* table_of(const BlockAttention& op, int32_t sequence, int64_t head) {
  return op.block_table + sequence * op.table_stride_batch + head * op.table_stride_head;
}

// Row `position` of the table of angles.
__device__ __forceinline__ int64_t angle_row(const BlockAttention& op, int64_t position) {
  return max(int64_t{0}, min(position, op.max_position - 1));
}

// A key's place in the pool, and the row of the table that it is rotated by. block < 0: nothing to see.
struct KeyPlace {
  int32_t block, slot, angles;
};

// Of key `key` in table order; there is nothing to see from `end` on.
__device__ __forceinline__ KeyPlace place_of(const AttentionKernel& p, const int32_t* table, int32_t key,
                                             int32_t end) {
  const BlockAttention& op = p.op;
  const KeyPlace nothing{-1, 0, 0};
  if (key >= end) return nothing;
  const uint32_t entry = p.block_size.quotient(static_cast<uint32_t>(key));
  const uint32_t slot = static_cast<uint32_t>(key) - entry * p.block_size.value;
  const int32_t block = table[entry];
  if (static_cast<uint32_t>(block) >= static_cast<uint64_t>(op.num_blocks)) return nothing;
  int64_t position = key;
  if (op.positions) {
    const int64_t at = block * op.block_size + slot;
    const int64_t own = op.positions_int64 ? static_cast<const int64_t*>(op.positions)[at]
                                           : static_cast<const int32_t*>(op.positions)[at];
    if (own < 0) return nothing;
    if (!op.packed) position = own;
  }
  return {block, static_cast<int32_t>(slot), static_cast<int32_t>(angle_row(op, position))};
}

__device__ __forceinline__ int64_t query_position(const BlockAttention& op, int64_t query) {
  return op.q_positions_int64 ? static_cast<const int64_t*>(op.q_positions)[query]
                              : static_cast<const int32_t*>(op.q_positions)[query];
}

}  // namespace livevlm
