// SPDX-License-Identifier: Apache-2.0
// How well blocks fit a question, by their mean keys or bounds. Queries lie in the lanes: a softmax over
// blocks needs no sum across them.
#pragma once

#include "block_attention/retrieve_blocks.h"
#include "common/cpu_lanes.h"

namespace livevlm::LIVEVLM_CPU {

inline constexpr int64_t kTileLogits = 1 << 20;  // a panel of queries takes what it needs in any case

inline int64_t length_of(const RetrieveBlocks& p, int64_t batch) {
  const int64_t length = p.seq_lens ? p.seq_lens[batch] : p.num_entries;
  return length < 0 ? 0 : length < p.num_entries ? length : p.num_entries;
}

// Rows that are scored for each KV head: one for each query head if queries are averaged first.
inline int64_t rows_of(const RetrieveBlocks& p) {
  return p.group_size * (p.softmax ? p.num_queries : 1);
}

// Elements of a row in a product. Quest's bound is one of rows twice as long: of the positive elements of a
// query, then the negative ones, with the upper bounds of a block, then the lower ones.
inline int64_t depth_of(const RetrieveBlocks& p) {
  return p.kind == BlockScore::kMinMax ? 2 * p.head_dim : p.head_dim;
}

// Panels of queries that are scored at a time: as many as have room for their logits.
inline int64_t tile_panels(const RetrieveBlocks& p) {
  const int64_t fit = kTileLogits / (kPanel * p.num_entries), all = (rows_of(p) + kPanel - 1) / kPanel;
  return fit < 1 ? 1 : fit < all ? fit : all;
}

struct ScoreWorkspace {
  explicit ScoreWorkspace(const RetrieveBlocks& p)
      : num_panels((rows_of(p) + kPanel - 1) / kPanel),
        pitch(depth_of(p) - p.head_dim + round_up(p.head_dim, kWidth)),
        queries(num_panels * depth_of(p) * kPanel),
        keys(kDotRows * pitch),
        logits(tile_panels(p) * p.num_entries * kPanel),
        row(pitch) {
    for (int64_t i = 0; i < kDotRows * pitch; ++i) keys[i] = 0.0f;  // rows past the last are multiplied too
  }
  int64_t num_panels, pitch;
  Scratch<float> queries;  // [panel][depth][kPanel]
  Scratch<float> keys;     // [kDotRows][pitch]
  Scratch<float> logits;   // [panel of the tile][block][kPanel]: first logits, then their exp
  Scratch<float> row;
};

// Row `row` of a KV head, [head_dim].
template <typename Q>
void load_query(const RetrieveBlocks& p, int64_t batch, int64_t head, int64_t row, float* values) {
  const Q* source = static_cast<const Q*>(p.q.data) + batch * p.q.stride_batch +
                    (head * p.group_size + row % p.group_size) * p.q.stride_head;
  const int64_t first = p.softmax ? row / p.group_size : 0, last = p.softmax ? first + 1 : p.num_queries;
  for (int64_t i = 0; i < p.head_dim; i += kWidth) store(values + i, Lanes{});
  for (int64_t query = first; query < last; ++query) {
    for_each_lanes(source + query * p.q.stride_token, p.head_dim, p.q.stride_dim,
                   [=](int64_t i, Lanes x) { store(values + i, load(values + i) + x); });
  }
  for (int64_t i = 0; i < p.head_dim; ++i) values[i] /= static_cast<float>(last - first);
}

template <typename Q>
void load_queries(const RetrieveBlocks& p, ScoreWorkspace& w, int64_t batch, int64_t head) {
  const int64_t depth = depth_of(p);
  for (int64_t i = 0; i < w.num_panels * kPanel; ++i) {
    float* column = w.queries + i / kPanel * depth * kPanel + i % kPanel;
    const bool real = i < rows_of(p);
    if (real) load_query<Q>(p, batch, head, i, w.row);
    for (int64_t dim = 0; dim < p.head_dim; ++dim) {
      const float value = real ? w.row[dim] : 0.0f;
      if (p.kind == BlockScore::kMinMax) {  // a NaN stays in both
        column[dim * kPanel] = value < 0.0f ? 0.0f : value;
        column[(dim + p.head_dim) * kPanel] = value > 0.0f ? 0.0f : value;
      } else {
        column[dim * kPanel] = value;
      }
    }
  }
}

// The logits of the panels `first` to `last` - 1 for all blocks.
template <typename K>
void find_logits(const RetrieveBlocks& p, ScoreWorkspace& w, int64_t batch, int64_t head, int64_t length,
                 int64_t first, int64_t last) {
  const int64_t depth = depth_of(p);
  const auto load_key = [&](int64_t offset, float* target) {
    for_each_lanes(static_cast<const K*>(p.keys.data) + offset, p.head_dim, p.keys.stride_dim,
                   [=](int64_t i, Lanes x) { store(target + i, x); });
  };
  for (int64_t block = 0; block < length; block += kDotRows) {
    for (int64_t row = 0; row < kDotRows && block + row < length; ++row) {
      const int64_t offset =
          batch * p.keys.stride_batch + (block + row) * p.keys.stride_token + head * p.keys.stride_head;
      float* key = w.keys + row * w.pitch;
      const bool bounds = p.kind == BlockScore::kMinMax;
      load_key(bounds ? offset + p.upper : offset, key);
      if (bounds) load_key(offset, key + p.head_dim);  // over what the first has filled up with
    }
    for (int64_t panel = first; panel < last; ++panel) {
      const DotSums sums = dot_panel(w.keys, w.pitch, w.queries + panel * depth * kPanel, depth);
      float* logits = w.logits + ((panel - first) * p.num_entries + block) * kPanel;
      for (int row = 0; row < kDotRows && block + row < length; ++row) {
        store(logits + row * kPanel, sums.at[row][0]);
        store(logits + row * kPanel + kWidth, sums.at[row][1]);
      }
    }
  }
}

// Adds up a vector of rows for each block: logits, or their softmax over the blocks. `count` rows are real.
inline void add_scores(const RetrieveBlocks& p, float* logits, int64_t count, int64_t length, float* scores) {
  IntLanes real{};
  for (int i = 0; i < kWidth; ++i) real[i] = i < count ? -1 : 0;
  Lanes shares = broadcast(1.0f);
  if (p.softmax) {
    // The exp of -inf - -inf would be NaN.
    Lanes top = broadcast(std::numeric_limits<float>::lowest()), total{};
    for (int64_t block = 0; block < length; ++block)
      top = maximum(load(logits + block * kPanel) * p.sm_scale, top);
    for (int64_t block = 0; block < length; ++block) {
      const Lanes weight = exp_not_positive(load(logits + block * kPanel) * p.sm_scale - top);
      total += weight;
      store(logits + block * kPanel, weight);
    }
    shares = 1.0f / total;
  }
  for (int64_t block = 0; block < length; ++block)
    scores[block] += sum(select(real, load(logits + block * kPanel) * shares, Lanes{}));
}

// scores: [num_entries] of one KV head.
template <typename Q, typename K>
void one_head(const RetrieveBlocks& p, ScoreWorkspace& w, int64_t batch, int64_t head, float* scores) {
  const int64_t length = length_of(p, batch);
  for (int64_t block = 0; block < p.num_entries; ++block) scores[block] = 0.0f;
  load_queries<Q>(p, w, batch, head);
  const int64_t step = tile_panels(p);
  for (int64_t first = 0; first < w.num_panels; first += step) {
    const int64_t last = first + step < w.num_panels ? first + step : w.num_panels;
    find_logits<K>(p, w, batch, head, length, first, last);
    for (int64_t row = first * kPanel; row < last * kPanel && row < rows_of(p); row += kWidth) {
      float* logits = w.logits + (row / kPanel - first) * p.num_entries * kPanel + row % kPanel;
      add_scores(p, logits, rows_of(p) - row, length, scores);
    }
  }
}

}  // namespace livevlm::LIVEVLM_CPU
