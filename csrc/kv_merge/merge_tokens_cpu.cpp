// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `merge_tokens`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
//
// With survivors, first the row of every token: a matrix product of unit keys, of which only maxima are kept.
// Then the tokens are sorted by row, so that one thread sums each row of the result, in token order.
#include <cmath>

#include "common/cpu_lanes.h"
#include "common/parallel.h"
#include "kv_merge/merge_tokens.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

constexpr int64_t kGrain = 32768;              // elements worth waking a thread for
constexpr int64_t kTileTokens = 8 * kDotRows;  // tokens that a panel of survivors is read for at once

template <typename T>
const T* row_of(const Tokens& tokens, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(tokens.data) + batch * tokens.stride_batch + token * tokens.stride_token +
         head * tokens.stride_head;
}

int64_t length_of(const MergeTokens& p, int64_t batch) {
  const int64_t length = p.seq_lens ? p.seq_lens[batch] : p.seq_len;
  return length < 0 ? 0 : length < p.seq_len ? length : p.seq_len;
}

// The key of a token, all heads as one vector, with length 1; a zero key stays zero. Heads are `pitch` apart.
template <typename T>
void unit_key(const MergeTokens& p, int64_t batch, int64_t token, int64_t pitch, float* unit) {
  Lanes squares{};
  for (int64_t head = 0; head < p.num_heads; ++head) {
    for_each_lanes(row_of<T>(p.k, batch, token, head), p.head_dim, p.k.stride_dim, [&](int64_t i, Lanes x) {
      store(unit + head * pitch + i, x);
      squares += x * x;
    });
  }
  const float length = std::sqrt(sum(squares));
  if (length == 0.0f) return;
  for (int64_t i = 0; i < p.num_heads * pitch; i += kWidth) store(unit + i, load(unit + i) / length);
}

// The highest cosine of a token so far, for each column modulo kPanel, and its column.
struct Best {
  Lanes cosine[2];
  IntLanes column[2];
};

void fold(const Lanes* cosines, int32_t first_column, int32_t num_columns, Best& best) {
  IntLanes column{};
  for (int i = 0; i < kWidth; ++i) column[i] = first_column + i;
  for (int half = 0; half < 2; ++half, column += kWidth) {
    const Lanes cosine = cosines[half], old = best.cosine[half];
    // NaN counts as the highest, as in torch.argmax.
    const IntLanes better = ((cosine > old) | ((cosine != cosine) & (old == old))) & (column < num_columns);
    best.cosine[half] = better ? cosine : old;
    best.column[half] = better ? column : best.column[half];
  }
}

int32_t column_of(const Best& best) {
  float highest = -kInfinity;
  int32_t column = 0;
  for (int i = 0; i < kPanel; ++i) {
    const float cosine = best.cosine[i / kWidth][i % kWidth];
    const int32_t mine = best.column[i / kWidth][i % kWidth];
    const bool tie = cosine == highest || (cosine != cosine && highest != highest);
    const bool higher = cosine > highest || (cosine != cosine && highest == highest);
    if (higher || (tie && mine < column)) {
      highest = cosine;
      column = mine;
    }
  }
  return column;
}

// groups[token]: the row of the survivor nearest to it, its own if it is one; -1 if there is none.
// panels: room for the keys of all survivors, [panel][depth][kPanel]; rows, merged: for one number a survivor
// and a token. Keys of other tokens are widened a few at a time.
template <typename T>
void nearest_survivors(const MergeTokens& p, int64_t batch, float* panels, int32_t* rows, int32_t* merged,
                       int32_t* groups) {
  const int64_t length = length_of(p, batch);
  const int64_t pitch = round_up(p.head_dim, kWidth), depth = p.num_heads * pitch;
  const int32_t* indices = p.indices + batch * p.num_groups;
  for (int64_t token = 0; token < p.seq_len; ++token) groups[token] = -1;
  int32_t num_survivors = 0;
  for (int64_t row = 0; row < p.num_groups; ++row) {
    if (indices[row] < 0 || indices[row] >= length) continue;
    groups[indices[row]] = static_cast<int32_t>(row);
    rows[num_survivors++] = static_cast<int32_t>(row);
  }
  if (num_survivors == 0) return;
  int64_t num_merged = 0;
  for (int64_t token = 0; token < length; ++token) {
    if (groups[token] < 0) merged[num_merged++] = static_cast<int32_t>(token);
  }

  const int64_t num_panels = (num_survivors + kPanel - 1) / kPanel;
  parallel_for(0, num_panels, kGrain / (depth * kPanel) + 1, [&](int64_t first, int64_t last) {
    const Scratch<float> unit(depth);
    for (int64_t column = first * kPanel; column < last * kPanel; ++column) {
      float* target = panels + column / kPanel * depth * kPanel + column % kPanel;
      if (column < num_survivors) {
        unit_key<T>(p, batch, indices[rows[column]], pitch, unit);
        for (int64_t i = 0; i < depth; ++i) target[i * kPanel] = unit[i];
      } else {
        for (int64_t i = 0; i < depth; ++i) target[i * kPanel] = 0.0f;
      }
    }
  });
  const int64_t num_tiles = (num_merged + kTileTokens - 1) / kTileTokens;
  const int64_t tile_work = kTileTokens * depth * num_panels * kPanel;
  parallel_for(0, num_tiles, kGrain / tile_work + 1, [&](int64_t first, int64_t last) {
    const Scratch<float> units(kTileTokens * depth);
    for (int64_t i = 0; i < kTileTokens * depth; ++i) units[i] = 0.0f;
    for (int64_t tile = first; tile < last; ++tile) {
      const int32_t* tokens = merged + tile * kTileTokens;
      const int64_t rest = num_merged - tile * kTileTokens, count = rest < kTileTokens ? rest : kTileTokens;
      Best best[kTileTokens];
      for (int64_t i = 0; i < count; ++i) unit_key<T>(p, batch, tokens[i], pitch, units + i * depth);
      for (Best& one : best) one = {{broadcast(-kInfinity), broadcast(-kInfinity)}, {}};
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        for (int64_t i = 0; i < count; i += kDotRows) {
          const DotSums sums = dot_panel(units + i * depth, depth, panels + panel * depth * kPanel, depth);
          for (int row = 0; row < kDotRows; ++row)
            fold(sums.at[row], static_cast<int32_t>(panel * kPanel), num_survivors, best[i + row]);
        }
      }
      for (int64_t i = 0; i < count; ++i) groups[tokens[i]] = rows[column_of(best[i])];
    }
  });
}

// The valid tokens of each group in token order: those of group g are order[offsets[g]..offsets[g + 1] - 1].
void sort_by_group(const MergeTokens& p, int64_t batch, const int32_t* groups, int32_t* order,
                   int32_t* offsets) {
  const int64_t length = length_of(p, batch);
  for (int64_t group = 0; group <= p.num_groups; ++group) offsets[group] = 0;
  const auto inside = [&](int32_t group) { return group >= 0 && group < p.num_groups; };
  for (int64_t token = 0; token < length; ++token) {
    if (inside(groups[token])) ++offsets[groups[token]];
  }
  int32_t end = 0;
  for (int64_t group = 0; group <= p.num_groups; ++group) offsets[group] = end += offsets[group];
  for (int64_t token = length; token-- > 0;) {  // backwards: the ends become the starts
    if (inside(groups[token])) order[--offsets[groups[token]]] = static_cast<int32_t>(token);
  }
}

// A row of one head of the result. `size`: the sum of the weights.
template <typename T>
void mean(const MergeTokens& p, const Tokens& x, int64_t batch, int64_t head, const int32_t* tokens,
          int64_t count, float size, float* sums, T* out) {
  for (int64_t i = 0; i < p.head_dim; i += kWidth) store(sums + i, Lanes{});
  for (int64_t j = 0; j < count; ++j) {
    const int64_t token = tokens[j], at = batch * p.seq_len + token;
    const float weight = (p.sizes ? p.sizes[at] : 1.0f) * (p.weights ? p.weights[at] : 1.0f);
    for_each_lanes(row_of<T>(x, batch, token, head), p.head_dim, x.stride_dim,
                   [=](int64_t i, Lanes values) { store(sums + i, load(sums + i) + values * weight); });
  }
  for (int64_t i = 0; i < p.head_dim; i += kWidth) {
    const Lanes result = size == 0.0f ? Lanes{} : load(sums + i) / size;
    store(out + i, result, p.head_dim - i < kWidth ? p.head_dim - i : kWidth);
  }
}

template <typename T>
void one_group(const MergeTokens& p, int64_t batch, int64_t group, const int32_t* tokens, int64_t count,
               float* sums) {
  float size = 0.0f;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t at = batch * p.seq_len + tokens[j];
    size += (p.sizes ? p.sizes[at] : 1.0f) * (p.weights ? p.weights[at] : 1.0f);
  }
  const int64_t row = batch * p.num_groups + group;
  p.sizes_out[row] = size;
  for (int64_t head = 0; head < p.num_heads; ++head) {
    const int64_t at = (row * p.num_heads + head) * p.head_dim;
    mean(p, p.k, batch, head, tokens, count, size, sums, static_cast<T*>(p.k_out) + at);
    mean(p, p.v, batch, head, tokens, count, size, sums, static_cast<T*>(p.v_out) + at);
  }
}

}  // namespace

void merge_tokens_cpu(const MergeTokens& params) {
  const MergeTokens& p = params;
  const int64_t pitch = round_up(p.head_dim, kWidth);
  const Scratch<int32_t> order(p.batch * p.seq_len), offsets(p.batch * (p.num_groups + 1));
  const Scratch<int32_t> nearest(p.indices ? p.batch * p.seq_len : 0);
  const int32_t* groups = p.indices ? nearest : p.groups;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.indices) {
      const Scratch<float> panels(round_up(p.num_groups, kPanel) * p.num_heads * pitch);
      const Scratch<int32_t> rows(p.num_groups), merged(p.seq_len);
      for (int64_t batch = 0; batch < p.batch; ++batch)
        nearest_survivors<T>(p, batch, panels, rows, merged, nearest + batch * p.seq_len);
    }
    parallel_for(0, p.batch, kGrain / (p.seq_len + p.num_groups) + 1, [&](int64_t first, int64_t last) {
      for (int64_t batch = first; batch < last; ++batch)
        sort_by_group(p, batch, groups + batch * p.seq_len, order + batch * p.seq_len,
                      offsets + batch * (p.num_groups + 1));
    });
    const int64_t work = (p.seq_len / p.num_groups + 1) * p.num_heads * p.head_dim;
    parallel_for(0, p.batch * p.num_groups, kGrain / work + 1, [&](int64_t first, int64_t last) {
      const Scratch<float> sums(pitch);
      for (int64_t i = first; i < last; ++i) {
        const int64_t batch = i / p.num_groups, group = i % p.num_groups;
        const int32_t* bounds = offsets + batch * (p.num_groups + 1) + group;
        one_group<T>(p, batch, group, order + batch * p.seq_len + bounds[0], bounds[1] - bounds[0], sums);
      }
    });
  });
}

}  // namespace livevlm::LIVEVLM_CPU
