// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `block_attention`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
#include <cmath>

#include "block_attention/attention_panel.h"
#include "block_attention/attention_plan.h"
#include "block_attention/attention_rows.h"
#include "block_attention/block_attention.h"
#include "common/parallel.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

struct Workspace {
  Workspace(int64_t head_dim, int64_t state)
      : tile(head_dim),
        row(tile.pitch),
        queries(kTileRows * head_dim),
        starts(kTileRows),
        ends(kTileRows),
        weights(kTileKeys * kPanel),
        state(state) {}
  KeyTile tile;
  Scratch<float> row;
  Scratch<float> queries;         // [panel][head_dim][rows]
  Scratch<int32_t> starts, ends;  // [panel][rows]
  Scratch<float> weights;
  Scratch<float> state;  // [panel]
};

// The rows of an item; what fills its last panel up is zero and sees what the last row sees.
template <typename T>
void load_queries(const BlockAttention& p, const Item& item, int64_t lanes, Workspace& w) {
  for (int64_t i = 0; i < round_up(item.num_rows, lanes); ++i) {
    const bool real = i < item.num_rows;
    const int64_t row = item.first_row + (real ? i : item.num_rows - 1), query = row / p.group_size;
    float* column = w.queries + i / lanes * lanes * p.head_dim + i % lanes;
    if (real) {
      const int64_t token = item.sequence->first_query + query;
      load_row<T>(p.q, 0, token, item.head * p.group_size + row % p.group_size, p.head_dim, w.row);
      if (p.q_positions) rotate(p, position_at(p.q_positions, p.q_positions_int64, token), w.row);
    }
    for (int64_t dim = 0; dim < p.head_dim; ++dim)
      column[dim * lanes] = real ? w.row[dim] * p.sm_scale : 0.0f;
    const Range seen = seen_by(p, *item.sequence, query);
    w.starts[i] = static_cast<int32_t>(seen.begin);
    w.ends[i] = static_cast<int32_t>(seen.end);
  }
}

template <typename T, int kVectors>
void attend_all(const BlockAttention& p, const Item& item, Workspace& w, float* state) {
  constexpr int64_t kRows = kVectors * kWidth;
  const int64_t panels = (item.num_rows + kRows - 1) / kRows, size = State<kVectors>::size_of(p.head_dim);
  load_queries<T>(p, item, kRows, w);
  for (int64_t panel = 0; panel < panels; ++panel) State<kVectors>(state + panel * size, p.head_dim).clear();
  // Rows are ordered by query, and so are the keys they see.
  const int64_t low = w.starts[0], high = w.ends[item.num_rows - 1], splits = item.sequence->num_splits;
  const int64_t part = round_up((high - low + splits - 1) / splits, kTileKeys);
  const int64_t begin = low + item.split * part, end = begin + part < high ? begin + part : high;
  for (int64_t token = begin; token < end;) {
    token = load_keys<T>(p, item.batch, item.head, token, end, w.tile);
    for (int64_t panel = 0; panel < panels && w.tile.count > 0; ++panel) {
      const int32_t *starts = w.starts + panel * kRows, *ends = w.ends + panel * kRows;
      attend<kVectors>(w.tile,
                       {.queries = w.queries + panel * kRows * p.head_dim,
                        .starts = starts,
                        .ends = ends,
                        .first_start = starts[0],
                        .last_start = starts[kRows - 1],
                        .first_end = ends[0],
                        .last_end = ends[kRows - 1],
                        .state = state + panel * size},
                       p.head_dim, w.weights);
    }
  }
}

// States -> rows of the result.
template <typename T, int kVectors>
void write(const BlockAttention& p, const Item& item, float* states) {
  constexpr int64_t kRows = kVectors * kWidth;
  for (int64_t i = 0; i < item.num_rows; ++i) {
    const State<kVectors> state(states + i / kRows * State<kVectors>::size_of(p.head_dim), p.head_dim);
    const int64_t lane = i % kRows, row = item.first_row + i;
    const int64_t at = (item.sequence->first_query + row / p.group_size) * p.num_heads * p.group_size +
                       item.head * p.group_size + row % p.group_size;
    const float total = state.total()[lane];
    T* out = static_cast<T*>(p.out) + at * p.head_dim;
    for (int64_t dim = 0; dim < p.head_dim; ++dim)
      out[dim] = from_float<T>(total == 0.0f ? 0.0f : state.sums[dim * kRows + lane] / total);
    p.lse[at] = state.top[lane] + std::log(total);  // -inf for 0
  }
}

template <typename T, int kVectors>
void run(const BlockAttention& p, const Item& item, Workspace& w, float* states) {
  const bool split = item.sequence->num_splits > 1;
  float* state = split ? states + item.state : w.state;
  attend_all<T, kVectors>(p, item, w, state);
  if (!split) write<T, kVectors>(p, item, state);
}

template <typename T, int kVectors>
void join_splits(const BlockAttention& p, const Item& item, float* states) {
  const int64_t size = State<kVectors>::size_of(p.head_dim), all = tile_state(p, *item.sequence);
  for (int64_t at = 0; at < all; at += size) {
    const State<kVectors> state(states + item.state + at, p.head_dim);
    for (int64_t split = 1; split < item.sequence->num_splits; ++split)
      join(state, State<kVectors>(states + item.state + split * all + at, p.head_dim));
  }
  write<T, kVectors>(p, item, states + item.state);
}

}  // namespace

void block_attention_cpu(const BlockAttention& params) {
  constexpr int64_t kGrain = 32768;  // multiplications worth waking a thread for
  const BlockAttention& p = params;
  const Scratch<Sequence> sequences(p.batch);
  int64_t num_items = 0, num_states = 0, most_state = 0, work = 0;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    Sequence& s = sequences[batch] = sequence_of(p, batch);
    const int64_t items = s.num_tiles * p.num_heads * s.num_splits, state = tile_state(p, s);
    s.first_item = num_items;
    s.first_state = num_states;
    num_items += items;
    num_states += s.num_splits > 1 ? items * state : 0;
    most_state = most_state < state ? state : most_state;
    work += s.num_rows * p.num_heads * s.length * p.head_dim;
  }
  const Scratch<float> states(num_states);
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t num_out = p.total_q * p.num_heads * p.group_size;
    if (p.cu_seqlens_q) {  // there may be rows outside of all sequences
      for (int64_t i = 0; i < num_out * p.head_dim; ++i) static_cast<T*>(p.out)[i] = from_float<T>(0.0f);
      for (int64_t i = 0; i < num_out; ++i) p.lse[i] = -kInfinity;
    }
    if (num_items == 0) return;
    // Items differ in length: a thread takes the next one when it is done with the last, not a range of them.
    int64_t next = 0;
    const int64_t grain = kGrain / (work / num_items + 1) + 1;
    parallel_for(0, num_items, grain, [&](int64_t, int64_t) {
      Workspace workspace(p.head_dim, most_state);
      for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < num_items;) {
        const Item item = item_at(p, sequences, i);
        vectors_of(*item.sequence) == 1 ? run<T, 1>(p, item, workspace, states)
                                        : run<T, 2>(p, item, workspace, states);
      }
    });
    if (num_states == 0) return;
    parallel_for(0, num_items, grain * kSplitKeys, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Item item = item_at(p, sequences, i);
        if (item.split > 0 || item.sequence->num_splits == 1) continue;
        vectors_of(*item.sequence) == 1 ? join_splits<T, 1>(p, item, states)
                                        : join_splits<T, 2>(p, item, states);
      }
    });
  });
}

}  // namespace livevlm::LIVEVLM_CPU
