// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `score_tokens`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
//
// A thread takes one KV head of one sequence, and as many of its queries at a time as have room for their
// logits in kTileWeights: computing those twice would take longer. Queries lie in the lanes, so that a
// softmax over keys needs no sum across them.
#include "common/cpu_lanes.h"
#include "common/parallel.h"
#include "kv_evict/score_tokens.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

constexpr int64_t kTileWeights = 1 << 20;    // floats; a panel of queries takes what it needs in any case
constexpr int64_t kTileKeys = 8 * kDotRows;  // keys that a panel of queries is read for at once

int64_t length_of(const ScoreTokens& p, int64_t batch) {
  const int64_t length = p.seq_lens ? p.seq_lens[batch] : p.seq_len;
  return length < 0 ? 0 : length < p.seq_len ? length : p.seq_len;
}

int64_t panels_of(const ScoreTokens& p) {
  return (p.num_queries * p.group_size + kPanel - 1) / kPanel;
}

int64_t tile_panels(const ScoreTokens& p, int64_t length) {
  const int64_t fit = kTileWeights / (kPanel * length), all = panels_of(p);
  return fit < 1 ? 1 : fit < all ? fit : all;
}

// Enough for every length up to seq_len.
int64_t weights_of(const ScoreTokens& p) {
  const int64_t panel = kPanel * p.seq_len, all = panels_of(p) * panel;
  const int64_t tile = panel > kTileWeights ? panel : kTileWeights;
  return tile < all ? tile : all;
}

struct Workspace {
  explicit Workspace(const ScoreTokens& p)
      : pitch(round_up(p.head_dim, kWidth)),
        queries(panels_of(p) * p.head_dim * kPanel),
        ends(panels_of(p) * kPanel),
        highest(panels_of(p) * kPanel),
        keys(kTileKeys * pitch),
        weights(weights_of(p)) {
    for (int64_t i = 0; i < kTileKeys * pitch; ++i)
      keys[i] = 0.0f;  // rows past the last key are multiplied too
  }
  int64_t pitch;
  Scratch<float> queries;  // [panel][head_dim][kPanel], scaled
  Scratch<int32_t> ends;   // keys before it are seen
  Scratch<float> highest;  // logit
  Scratch<float> keys;     // [kTileKeys][pitch], rotated
  Scratch<float> weights;  // [panel of the tile][key][kPanel]: first logits, then their exp
};

template <typename T>
void load_queries(const ScoreTokens& p, Workspace& w, int64_t batch, int64_t head, int64_t length) {
  const int64_t count = p.num_queries * p.group_size;
  for (int64_t i = 0; i < panels_of(p) * kPanel; ++i) {
    float* column = w.queries + i / kPanel * p.head_dim * kPanel + i % kPanel;
    const int64_t query = i / p.group_size;
    const T* source = static_cast<const T*>(p.q.data) + batch * p.q.stride_batch + query * p.q.stride_token +
                      (head * p.group_size + i % p.group_size) * p.q.stride_head;
    for (int64_t dim = 0; dim < p.head_dim; ++dim)
      column[dim * kPanel] = i < count ? to_float(source[dim * p.q.stride_dim]) * p.sm_scale : 0.0f;
    const int64_t end = p.causal ? length - p.num_queries + 1 + query : length;
    w.ends[i] = static_cast<int32_t>(i < count && end > 0 ? end : 0);  // what fills a panel up sees nothing
  }
}

template <typename T>
void load_key(const ScoreTokens& p, int64_t batch, int64_t token, int64_t head, float* __restrict key) {
  const T* source = static_cast<const T*>(p.k.data) + batch * p.k.stride_batch + token * p.k.stride_token +
                    head * p.k.stride_head;
  for_each_lanes(source, p.head_dim, p.k.stride_dim, [=](int64_t i, Lanes x) { store(key + i, x); });
  if (!p.positions) return;
  const int64_t at = batch * p.seq_len + token;
  int64_t position = p.positions_int64 ? static_cast<const int64_t*>(p.positions)[at]
                                       : static_cast<const int32_t*>(p.positions)[at];
  position = position < 0 ? 0 : position < p.max_position ? position : p.max_position - 1;
  const int64_t half = p.head_dim / 2;
  const float* __restrict cosines = p.cos_sin_cache + position * p.head_dim;
  const float* __restrict sines = cosines + half;
  for (int64_t i = 0; i < half; ++i) {
    const float first = key[i], second = key[i + half];
    key[i] = first * cosines[i] - second * sines[i];
    key[i + half] = second * cosines[i] + first * sines[i];
  }
}

// The logits of some panels of queries for the keys begin..begin + count - 1, which w.keys holds.
void find_logits(const ScoreTokens& p, Workspace& w, int64_t first_panel, int64_t num_panels, int64_t length,
                 int64_t begin, int64_t count) {
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    const int64_t lane = (first_panel + panel) * kPanel;
    IntLanes ends[2];
    std::memcpy(ends, w.ends + lane, sizeof ends);
    Lanes highest[2] = {load(w.highest + lane), load(w.highest + lane + kWidth)};
    for (int64_t i = 0; i < count; i += kDotRows) {
      const DotSums sums =
          dot_panel(w.keys + i * w.pitch, w.pitch, w.queries + lane * p.head_dim, p.head_dim);
      for (int row = 0; row < kDotRows && i + row < count; ++row) {
        const int64_t key = begin + i + row;
        float* logits = w.weights + (panel * length + key) * kPanel;
        for (int half = 0; half < 2; ++half) {
          const Lanes logit =
              ends[half] > static_cast<int32_t>(key) ? sums.at[row][half] : broadcast(-kInfinity);
          highest[half] = maximum(logit, highest[half]);
          store(logits + half * kWidth, logit);
        }
      }
    }
    store(w.highest + lane, highest[0]);
    store(w.highest + lane + kWidth, highest[1]);
  }
}

// Logits -> exp, in place. shares: what a query's weights count for in the mean, 0 if it sees no key.
void find_weights(const ScoreTokens& p, const float* highest, float* weights, int64_t length, float* shares) {
  // The exp of -inf - -inf would be NaN.
  const Lanes lowest = broadcast(std::numeric_limits<float>::lowest());
  const Lanes top[2] = {maximum(load(highest), lowest), maximum(load(highest + kWidth), lowest)};
  Lanes totals[2] = {};
  for (int64_t key = 0; key < length; ++key) {
    for (int half = 0; half < 2; ++half) {
      float* at = weights + key * kPanel + half * kWidth;
      const Lanes weight = exp_not_positive(load(at) - top[half]);
      totals[half] += weight;
      store(at, weight);
    }
  }
  const auto count = static_cast<float>(p.num_queries * p.group_size);
  for (int half = 0; half < 2; ++half)
    store(shares + half * kWidth, select(totals[half] == 0.0f, Lanes{}, 1.0f / (totals[half] * count)));
}

// scores: [seq_len] of one KV head.
template <typename T>
void one_head(const ScoreTokens& p, Workspace& w, int64_t batch, int64_t head, float* scores) {
  const int64_t length = length_of(p, batch), num_panels = panels_of(p);
  for (int64_t i = 0; i < p.seq_len; ++i) scores[i] = 0.0f;
  if (length == 0) return;
  load_queries<T>(p, w, batch, head, length);
  for (int64_t i = 0; i < num_panels * kPanel; ++i) w.highest[i] = -kInfinity;
  const int64_t step = tile_panels(p, length);
  for (int64_t first = 0; first < num_panels; first += step) {
    const int64_t panels = num_panels - first < step ? num_panels - first : step;
    for (int64_t begin = 0; begin < length; begin += kTileKeys) {
      const int64_t count = length - begin < kTileKeys ? length - begin : kTileKeys;
      for (int64_t i = 0; i < count; ++i) load_key<T>(p, batch, begin + i, head, w.keys + i * w.pitch);
      find_logits(p, w, first, panels, length, begin, count);
    }
    float* shares = w.highest + first * kPanel;  // each takes the place of its query's maximum
    for (int64_t panel = 0; panel < panels; ++panel)
      find_weights(p, shares + panel * kPanel, w.weights + panel * length * kPanel, length,
                   shares + panel * kPanel);
    for (int64_t key = 0; key < length; ++key) {
      Lanes total{};
      for (int64_t panel = 0; panel < panels; ++panel) {
        const float* weights = w.weights + (panel * length + key) * kPanel;
        total += load(weights) * load(shares + panel * kPanel);
        total += load(weights + kWidth) * load(shares + panel * kPanel + kWidth);
      }
      scores[key] += sum(total);
    }
  }
}

// The mean over heads, and then over `num_shared` sequences: row `row` of the result.
void average(const ScoreTokens& p, const float* scores, int64_t row) {
  float* out = p.out + row * p.seq_len;
  for (int64_t i = 0; i < p.seq_len; ++i) out[i] = 0.0f;
  for (int64_t batch = row * p.num_shared; batch < (row + 1) * p.num_shared; ++batch) {
    const float* heads = scores + batch * p.num_heads * p.seq_len;
    for (int64_t i = 0; i < p.seq_len; ++i) {
      float total = 0.0f;
      for (int64_t head = 0; head < p.num_heads; ++head) total += heads[head * p.seq_len + i];
      out[i] += total / static_cast<float>(p.num_heads);
    }
  }
  for (int64_t i = 0; i < p.seq_len; ++i) out[i] /= static_cast<float>(p.num_shared);
}

}  // namespace

void score_tokens_cpu(const ScoreTokens& params) {
  constexpr int64_t kGrain = 32768;  // multiplications, or additions, worth waking a thread for
  const ScoreTokens& p = params;
  const int64_t num_heads = p.batch * p.num_heads;
  const Scratch<float> separate(p.per_head ? 0 : num_heads * p.seq_len);
  float* scores = p.per_head ? p.out : separate;
  const int64_t work = p.num_queries * p.group_size * p.seq_len * p.head_dim;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, num_heads, kGrain / work + 1, [&](int64_t first, int64_t last) {
      Workspace workspace(p);
      for (int64_t i = first; i < last; ++i)
        one_head<T>(p, workspace, i / p.num_heads, i % p.num_heads, scores + i * p.seq_len);
    });
  });
  if (p.per_head) return;
  const int64_t additions = p.num_shared * p.num_heads * p.seq_len;
  parallel_for(0, p.batch / p.num_shared, kGrain / additions + 1, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) average(p, scores, row);
  });
}

}  // namespace livevlm::LIVEVLM_CPU
