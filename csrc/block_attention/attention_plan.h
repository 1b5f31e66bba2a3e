// SPDX-License-Identifier: Apache-2.0
// How `block_attention` is cut into items of work on CPUs.
//
// An item is one KV head of one sequence, up to kTileRows rows (a row is one query of one query head), and a
// part of the keys they see. Where there are few rows the keys are split, so that one query keeps all threads
// busy, and the states of the parts are joined. All of that follows from the sequence alone.
#pragma once

#include "block_attention/attention_panel.h"
#include "block_attention/block_attention.h"

namespace livevlm::LIVEVLM_CPU {

inline constexpr int64_t kTileRows = 16 * kPanel;
inline constexpr int64_t kSplitKeys = 512;  // keys worth an item of their own
inline constexpr int64_t kItems = 64;       // that a sequence is split into, if it has the keys

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value < high ? value : high;
}

struct Sequence {
  int64_t first_query, num_rows;
  int64_t first_end;  // number behind the last key that the first query sees, before it is clamped
  int64_t length;     // keys
  int64_t num_tiles, num_splits, first_item;
  int64_t first_state;  // where the states of its items begin, if they have to be joined
};

inline int64_t vectors_of(const Sequence& s) {
  return s.num_rows <= kWidth ? 1 : 2;
}

inline Sequence sequence_of(const BlockAttention& p, int64_t batch) {
  const int64_t even = p.total_q / p.batch, seq_len = p.seq_lens[batch];
  const int64_t begin = p.cu_seqlens_q ? p.cu_seqlens_q[batch] : batch * even;
  const int64_t end = p.cu_seqlens_q ? p.cu_seqlens_q[batch + 1] : begin + even;
  const int64_t first = clamp(begin, 0, p.total_q), last = clamp(end, first, p.total_q);
  Sequence s{};
  s.first_query = first;
  s.num_rows = (last - first) * p.group_size;
  s.first_end = p.causal ? seq_len - (end - first) + 1 : seq_len;
  // Both factors may be anything; as seq_lens is int32, so is the number of every key.
  s.length = seq_len <= 0                             ? 0
             : seq_len / p.block_size >= p.max_blocks ? p.max_blocks * p.block_size
                                                      : seq_len;
  const int64_t most =
      p.window > 0 && p.window < s.length - (last - first) ? p.window + last - first : s.length;
  s.num_tiles = (s.num_rows + kTileRows - 1) / kTileRows;
  s.num_splits = s.num_rows == 0 ? 0 : clamp(kItems / (s.num_tiles * p.num_heads), 1, most / kSplitKeys + 1);
  return s;
}

struct Range {
  int64_t begin, end;
};

// Numbers of the keys that a query of a sequence sees.
inline Range seen_by(const BlockAttention& p, const Sequence& s, int64_t query) {
  const int64_t end = p.causal ? s.first_end + query : s.first_end;
  const int64_t begin = p.window > 0 && end > p.window ? end - p.window : 0;
  return {clamp(begin, 0, s.length), clamp(end, 0, s.length)};
}

struct Item {
  const Sequence* sequence;
  int64_t batch, head, first_row, num_rows, split;
  int64_t state;  // where its state lies, if it has to be joined
};

// Floats that the states of one tile of rows take.
inline int64_t tile_state(const BlockAttention& p, const Sequence& s) {
  const int64_t size = vectors_of(s) == 1 ? State<1>::size_of(p.head_dim) : State<2>::size_of(p.head_dim);
  const int64_t most = s.num_rows < kTileRows ? s.num_rows : kTileRows, lanes = vectors_of(s) * kWidth;
  return (most + lanes - 1) / lanes * size;
}

inline Item item_at(const BlockAttention& p, const Sequence* sequences, int64_t number) {
  int64_t low = 0, high = p.batch - 1;  // the last sequence that starts at or before it
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (sequences[middle].first_item <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Sequence& s = sequences[low];
  const int64_t index = number - s.first_item, first_row = index / (s.num_splits * p.num_heads) * kTileRows;
  const int64_t rest = s.num_rows - first_row;
  return {&s,
          low,
          index / s.num_splits % p.num_heads,
          first_row,
          rest < kTileRows ? rest : kTileRows,
          index % s.num_splits,
          s.first_state + index * tile_state(p, s)};
}

}  // namespace livevlm::LIVEVLM_CPU
