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
  Divisor block_size, num_heads, group_size, num_qo_heads;
  Divisor queries_each;        // of a sequence, without cu_seqlens_q
  Divisor most_parts;          // most_splits * kParts
  int32_t most_keys;           // that a table has room for
  float scale;                 // sm_scale in units of log 2
  int32_t min_rows, max_rows;  // of a KV head: other sequences are left to another kernel
  int32_t tile_rows;
  int32_t num_tiles;    // of a KV head, at most
  Divisor tiles_each;   // of a sequence, without cu_seqlens_q
  bool tile_a_query;    // with cu_seqlens_q: a sequence has at most one tile for each query
  int32_t most_splits;  // that a sequence is cut into
  int32_t tile_splits;  // that keep a GPU busy with kManyRows
  int32_t half_rows;    // sequences with at most so many rows have tiles of half of kManyRows
  int32_t even_splits;  // of many rows, so that the last of them find the GPU busy, too
  int32_t num_splits;   // of these, as many as can have keys
  int32_t together;     // neighbouring splits that are merged where they are found: 1 or kTogether
  Divisor num_found;    // of a sequence of few rows: num_splits / together, rounded up
  bool many_apart;      // sequences of many rows have a kernel of their own
  uint32_t k_block, k_slot, v_block, v_slot;  // strides in pieces of 16 bytes, if keys and values have such
  int64_t found_region;                       // see found_at()
  float* found_out;                           // [head_dim] each, relative to the top
  float2* found_sums;                         // top, sum of exponentials relative to it
};

// Keys of a step of a warp, and parts of a split: what is found in these is merged one after the other, and
// then that of kTogether neighbouring splits.
inline constexpr int kStepKeys = 16, kParts = 8, kTogether = 4;

// No more of a sequence's keys are seen, so that numbers of keys fit 32 bits with some room.
inline constexpr int64_t kMostKeys = int64_t{1} << 30;

// Rows of a KV head that keep a thread block busy.
inline constexpr int kManyRows = 128;

// Sequences with more rows than this go to the kernel for many rows, if there is one for this GPU.
inline constexpr int32_t kFewest = 32;

// Sequences of many rows with fewer keys than this are not worth even_splits.
inline constexpr int64_t kEvenKeys = 4096;
// Nor are those whose thread blocks run in more waves: the last one is a small part of them.
inline constexpr int64_t kEvenWaves = 6;

// Splits of a sequence: many rows need few of them to keep a GPU busy.
__host__ __device__ inline int64_t splits_of_rows(const AttentionKernel& p, int64_t rows,
                                                  int64_t keys = kEvenKeys) {
  if (rows <= kFewest) return p.most_splits;
  const int64_t tiles = (rows + kManyRows - 1) / kManyRows * (rows <= p.half_rows ? 2 : 1);
  int64_t best = p.tile_splits / tiles;
  if (best > p.even_splits) return best < p.most_splits ? best : p.most_splits;
  if (best < 1) best = 1;
  if (keys < kEvenKeys) return best;
  // Thread blocks run in waves of equal length. A further split costs time, too: an eighth is to be gained.
  const auto waves = [&](int64_t splits) { return (tiles * splits + p.tile_splits - 1) / p.tile_splits; };
  for (int64_t more = best + 1; more <= p.even_splits && waves(more) <= kEvenWaves; ++more) {
    if (9 * waves(more) * best <= 8 * waves(best) * more) best = more;
  }
  return best;
}

// No key yet: below every logit.
inline constexpr float kNoTop = -1e30f;

// A range of keys.
struct Range {
  int32_t begin, end;
};

// How the keys of a sequence are cut: the first key of split 0, and how many keys a part and a split have.
struct Cut {
  int32_t first, part, split;
};

struct Sequence {
  int32_t index, first_query, num_queries, num_keys;

  __device__ __forceinline__ Sequence(const AttentionKernel& p, int32_t index) : index(index) {
    first_query = start_of(p, index);
    num_queries = max(0, start_of(p, index + 1) - first_query);
    num_keys = max(0, min(p.op.seq_lens[index], p.most_keys));
  }

  static __device__ __forceinline__ int32_t start_of(const AttentionKernel& p, int32_t index) {
    if (!p.op.cu_seqlens_q) return index * static_cast<int32_t>(p.queries_each.value);
    return max(0, min(p.op.cu_seqlens_q[index], static_cast<int32_t>(p.op.total_q)));
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
    return static_cast<int32_t>(splits_of_rows(p, num_rows(p.op), num_keys));
  }

  __device__ __forceinline__ Cut cut(const AttentionKernel& p) const {
    const int32_t first = seen(p.op, 0).begin, steps = (max(1, num_keys - first) + kStepKeys - 1) / kStepKeys;
    const int32_t rows = num_rows(p.op);
    if (rows <= kFewest) {
      const auto part = static_cast<int32_t>(p.most_parts.quotient(steps + p.most_parts.value - 1));
      return {first, part * kStepKeys, part * (kStepKeys * kParts)};
    }
    const int32_t splits = most_splits(p);
    if (p.many_apart) {  // no parts; a split as small as can be when num_splits is counted
      const int32_t split = max((steps + splits - 1) / splits, kParts) * kStepKeys;
      return {first, split, split};
    }
    const int32_t part = (steps + splits * kParts - 1) / (splits * kParts) * kStepKeys;
    return {first, part, part * kParts};
  }
};

// Rows of one sequence and KV head.
struct RowTile {
  Sequence sequence;
  int32_t first_row, num_rows;  // of the sequence's
  Range keys;                   // seen by at least one of them

  __device__ __forceinline__ RowTile(const AttentionKernel& p, const Sequence& sequence, int32_t number)
      : sequence(sequence), keys{0, 0} {
    const int32_t rows = sequence.num_rows(p.op);
    first_row = min(number * p.tile_rows, rows);
    num_rows = min(rows - first_row, p.tile_rows);
    if (rows < p.min_rows || rows > p.max_rows) num_rows = 0;
    if (num_rows > 0) {
      keys.begin = seen(p, 0).begin;
      keys.end = max(keys.begin, seen(p, num_rows - 1).end);
    }
  }

  // Its query, counted in the sequence.
  __device__ __forceinline__ int32_t query_of(const AttentionKernel& p, int32_t row) const {
    return static_cast<int32_t>(p.group_size.quotient(first_row + row));
  }

  __device__ __forceinline__ Range seen(const AttentionKernel& p, int32_t row) const {
    return sequence.seen(p.op, query_of(p, row));
  }

  // The keys of a split that the tile sees.
  __device__ __forceinline__ Range keys_of(const AttentionKernel& p, int32_t split) const {
    const Cut cut = sequence.cut(p);
    const int32_t first = cut.first + split * cut.split;
    return {max(keys.begin, first), min(keys.end, first + cut.split)};
  }

  // Row of q, out and lse, counted over all query heads.
  __device__ __forceinline__ int64_t flat_row(const AttentionKernel& p, int64_t head, int32_t row) const {
    const int32_t query = query_of(p, row), group = static_cast<int32_t>(p.op.group_size);
    return (int64_t{sequence.first_query} + query) * p.num_qo_heads.value + head * group +
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
  const int64_t start = p.found_region ? sequence.index * p.found_region
                                       : sequence.first_query * p.op.group_size * int64_t{p.num_found.value};
  int64_t each = p.num_found.value;
  if (sequence.num_rows(p.op) > kFewest)
    each = (min(sequence.most_splits(p), p.num_splits) + p.together - 1) / p.together;
  return (start + row * each + found) * p.op.num_heads + head;
}

// Tile `number` of a KV head. With cu_seqlens_q, sequence i owns the numbers from
// cu_seqlens_q[i] * group_size / tile_rows + i on, or from cu_seqlens_q[i] on if that is tighter: at least as
// many as it has tiles, and found without adding up those of the sequences before.
__device__ __forceinline__ RowTile tile_of(const AttentionKernel& p, int32_t number) {
  if (!p.op.cu_seqlens_q) {
    const auto index = static_cast<int32_t>(p.tiles_each.quotient(number));
    return RowTile(p, Sequence(p, index), number - index * static_cast<int32_t>(p.tiles_each.value));
  }
  const auto group = static_cast<int32_t>(p.op.group_size);
  const auto first_of = [&](int32_t index) {
    const int32_t query = Sequence::start_of(p, index);
    return p.tile_a_query ? query : query * group / p.tile_rows + index;
  };
  const int32_t index = last_at_most(p.op, number, first_of);
  return RowTile(p, Sequence(p, index), number - first_of(index));
}

// The sequence that a query belongs to. Of no sequence: num_queries is 0.
__device__ __forceinline__ Sequence sequence_of(const AttentionKernel& p, int32_t query) {
  if (!p.op.cu_seqlens_q) return Sequence(p, static_cast<int32_t>(p.queries_each.quotient(query)));
  const auto first_of = [&](int32_t index) { return Sequence::start_of(p, index); };
  Sequence sequence(p, last_at_most(p.op, query, first_of));
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

// A key's place in the pool. block < 0: outside of it.
struct KeySlot {
  int32_t block, slot;
};

// Of key `key` in table order; there is nothing from `end` on.
__device__ __forceinline__ KeySlot slot_of(const AttentionKernel& p, const int32_t* table, int32_t key,
                                           int32_t end) {
  if (key >= end) return {-1, 0};
  const uint32_t entry = p.block_size.quotient(static_cast<uint32_t>(key));
  const int32_t block = table[entry];
  if (static_cast<uint32_t>(block) >= static_cast<uint64_t>(p.op.num_blocks)) return {-1, 0};
  return {block, static_cast<int32_t>(static_cast<uint32_t>(key) - entry * p.block_size.value)};
}

// The row of the table of angles that a key is rotated by. Negative: its slot is empty.
__device__ __forceinline__ int32_t angles_of(const BlockAttention& op, const KeySlot& place, int32_t key) {
  int64_t position = key;
  if (op.positions) {
    const int64_t at = place.block * op.block_size + place.slot;
    const int64_t own = op.positions_int64 ? static_cast<const int64_t*>(op.positions)[at]
                                           : static_cast<const int32_t*>(op.positions)[at];
    if (own < 0) return -1;
    if (!op.packed) position = own;
  }
  return static_cast<int32_t>(angle_row(op, position));
}

// Both. block < 0: nothing to see.
struct KeyPlace {
  int32_t block, slot, angles;
};

__device__ __forceinline__ KeyPlace place_of(const AttentionKernel& p, const int32_t* table, int32_t key,
                                             int32_t end) {
  const KeySlot at = slot_of(p, table, key, end);
  if (at.block < 0) return {-1, 0, 0};
  const int32_t angles = angles_of(p.op, at, key);
  return angles < 0 ? KeyPlace{-1, 0, 0} : KeyPlace{at.block, at.slot, angles};
}

__device__ __forceinline__ int64_t query_position(const BlockAttention& op, int64_t query) {
  return op.q_positions_int64 ? static_cast<const int64_t*>(op.q_positions)[query]
                              : static_cast<const int32_t*>(op.q_positions)[query];
}

}  // namespace livevlm
