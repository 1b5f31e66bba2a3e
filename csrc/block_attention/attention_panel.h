// SPDX-License-Identifier: Apache-2.0
// The arithmetic of `block_attention` on CPUs: a panel of queries against a tile of keys.
//
// A row is one query of one query head. The rows of a panel lie in the lanes of kVectors registers, in both
// products: a logit is a key's element, broadcast, times queries, and a sum of values is a value's element,
// broadcast, times weights. So a softmax needs no sum across lanes, and nothing is transposed in between.
// Two vectors need fewer loads for a multiplication; one wastes fewer lanes on a single query.
#pragma once

#include "common/cpu_lanes.h"

namespace livevlm::LIVEVLM_CPU {

inline constexpr int kSums = 12;  // and what they are added from are all that 16 registers hold
inline constexpr int64_t kTileKeys = 8 * kSums;

// A few keys and their values, widened to float32. Keys that nobody can see are left out.
struct KeyTile {
  explicit KeyTile(int64_t head_dim)
      : pitch(round_up(round_up(head_dim, kSums), kWidth)),
        keys(kTileKeys * pitch),
        values(kTileKeys * pitch),
        numbers(kTileKeys) {
    // Products go on to a multiple of kSums, in elements of a value and in keys.
    for (int64_t i = 0; i < kTileKeys * pitch; ++i) keys[i] = values[i] = 0.0f;
  }
  int64_t pitch, count = 0;
  Scratch<float> keys, values;  // [kTileKeys][pitch]
  Scratch<int32_t> numbers;     // of the keys in table order, ascending
};

// Rows see the keys `starts` to `ends` - 1.
struct Panel {
  const float* queries;          // [head_dim][rows], scaled
  const int32_t *starts, *ends;  // [rows]
  int32_t first_start, last_start, first_end, last_end;
  float* state;  // what has been added up, see below
};

// State of a panel: values weighted by exp(logit - top), [round_up(head_dim, kSums)][rows]; then the highest
// logit and the sum of the weights of each row. A row that has seen nothing has the lowest float as `top`:
// the exp of -inf - -inf would be NaN.
template <int kVectors>
struct State {
  static constexpr int64_t kRows = kVectors * kWidth;
  static int64_t size_of(int64_t head_dim) { return (round_up(head_dim, kSums) + 2) * kRows; }

  State(float* data, int64_t head_dim) : sums(data), top(data + round_up(head_dim, kSums) * kRows) {}
  void clear() {
    for (float* at = sums; at < top; ++at) *at = 0.0f;
    for (int64_t i = 0; i < kRows; ++i) {
      top[i] = std::numeric_limits<float>::lowest();
      total()[i] = 0.0f;
    }
  }
  float* total() const { return top + kRows; }

  float *sums, *top;
};

template <int kVectors>
struct Products {
  Lanes at[kSums / kVectors][kVectors];
};

// Rows of `factors`, broadcast, times the columns of `panel`, [depth][kVectors * kWidth]. A sum runs over
// `depth` in order, whichever its row and column are.
template <int kVectors>
[[gnu::always_inline]] inline Products<kVectors> multiply(const float* factors, int64_t row_step,
                                                          int64_t depth_step, const float* panel,
                                                          int64_t depth) {
  Products<kVectors> sums{};
  for (int64_t i = 0; i < depth; ++i) {
    Lanes column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load(panel + (i * kVectors + v) * kWidth);
#pragma GCC unroll 12
    for (int row = 0; row < kSums / kVectors; ++row) {
      const Lanes factor = broadcast(factors[row * row_step + i * depth_step]);
      for (int v = 0; v < kVectors; ++v) sums.at[row][v] += factor * column[v];
    }
  }
  return sums;
}

// weights: [key of the tile][rows]. Raises `highest` to the highest logit.
template <int kVectors, bool kMasked>
void find_logits(const KeyTile& tile, const Panel& panel, int64_t head_dim, Lanes (&highest)[kVectors],
                 float* weights) {
  for (int64_t i = 0; i < tile.count; i += kSums / kVectors) {
    const auto logits =
        multiply<kVectors>(tile.keys + i * tile.pitch, tile.pitch, 1, panel.queries, head_dim);
#pragma GCC unroll 12
    for (int row = 0; row < kSums / kVectors; ++row) {
      if (i + row >= tile.count) break;
      for (int v = 0; v < kVectors; ++v) {
        Lanes logit = logits.at[row][v];
        if constexpr (kMasked) {
          IntLanes start, end;
          std::memcpy(&start, panel.starts + v * kWidth, sizeof start);
          std::memcpy(&end, panel.ends + v * kWidth, sizeof end);
          const int32_t number = tile.numbers[i + row];
          logit = select((start <= number) & (end > number), logit, broadcast(-kInfinity));
        }
        highest[v] = maximum(logit, highest[v]);
        store(weights + ((i + row) * kVectors + v) * kWidth, logit);
      }
    }
  }
}

// Adds a tile of keys to the state of a panel. `weights`: room for [kTileKeys][rows].
template <int kVectors>
void attend(const KeyTile& tile, const Panel& panel, int64_t head_dim, float* weights) {
  const int32_t first = tile.numbers[0], last = tile.numbers[tile.count - 1];
  if (last < panel.first_start || first >= panel.last_end) return;
  const State<kVectors> state(panel.state, head_dim);
  Lanes highest[kVectors], rescale[kVectors], total[kVectors];
  for (int v = 0; v < kVectors; ++v) highest[v] = load(state.top + v * kWidth);
  if (first >= panel.last_start && last < panel.first_end) {
    find_logits<kVectors, false>(tile, panel, head_dim, highest, weights);
  } else {
    find_logits<kVectors, true>(tile, panel, head_dim, highest, weights);
  }
  for (int v = 0; v < kVectors; ++v) {
    rescale[v] = exp_not_positive(load(state.top + v * kWidth) - highest[v]);
    total[v] = load(state.total() + v * kWidth) * rescale[v];
    store(state.top + v * kWidth, highest[v]);
  }
  for (int64_t i = 0; i < tile.count; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = weights + (i * kVectors + v) * kWidth;
      const Lanes weight = exp_not_positive(load(at) - highest[v]);
      total[v] += weight;
      store(at, weight);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(state.total() + v * kWidth, total[v]);
  for (int64_t dim = 0; dim < head_dim; dim += kSums / kVectors) {
    const auto sums = multiply<kVectors>(tile.values + dim, 1, tile.pitch, weights, tile.count);
#pragma GCC unroll 12
    for (int row = 0; row < kSums / kVectors; ++row) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = state.sums + ((dim + row) * kVectors + v) * kWidth;
        store(at, load(at) * rescale[v] + sums.at[row][v]);
      }
    }
  }
}

// Adds the state `part`, of other keys, to `state`.
template <int kVectors>
void join(const State<kVectors>& state, const State<kVectors>& part) {
  for (int v = 0; v < kVectors; ++v) {
    const Lanes old[2] = {load(state.top + v * kWidth), load(part.top + v * kWidth)};
    const Lanes top = maximum(old[0], old[1]);
    const Lanes factors[2] = {exp_not_positive(old[0] - top), exp_not_positive(old[1] - top)};
    const auto add = [&](float* at, const float* other) {
      store(at, load(at) * factors[0] + load(other) * factors[1]);
    };
    store(state.top + v * kWidth, top);
    add(state.total() + v * kWidth, part.total() + v * kWidth);
    for (float *at = state.sums + v * kWidth, *other = part.sums + v * kWidth; at < state.top;
         at += State<kVectors>::kRows, other += State<kVectors>::kRows)
      add(at, other);
  }
}

}  // namespace livevlm::LIVEVLM_CPU
