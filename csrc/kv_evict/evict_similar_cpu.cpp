// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `evict_similar`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
//
// The ops it stands for, one after another: what fusing saves on a GPU, launches and small tensors, costs a
// CPU nothing next to reading the keys and values.
#include "common/cpu_lanes.h"
#include "common/parallel.h"
#include "kv_evict/evict_similar.h"
#include "kv_evict/select_tokens.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

// Float32 scores [batch, seq_len] -> the `budget` best of each row.
void select_top(const float* scores, int64_t batch, int64_t seq_len, int64_t budget, int32_t* indices,
                int32_t* counts) {
  select_tokens_cpu({
      .scores = scores,
      .dtype = DType::kFloat32,
      .batch = batch,
      .seq_len = seq_len,
      .stride_batch = seq_len,
      .stride_token = 1,
      .seq_lens = nullptr,
      .buckets = nullptr,
      .budget = budget,
      .num_top = budget,
      .num_buckets = 1,
      .bucket_capacity = 1,
      .indices = indices,
      .counts = counts,
  });
}

float mean_of(const float* row, int64_t count) {
  Lanes total{};
  for_each_lanes(row, count, 1, [&](int64_t, Lanes x) { total += x; });
  return sum(total) / static_cast<float>(count);
}

// The mean over `num_shared` rows, into the first of them. With `by_mean` each row is divided by its mean
// first: value norms grow with depth, and the last layers alone would decide.
void average(float* rows, int64_t num_shared, int64_t seq_len, bool by_mean) {
  for (int64_t layer = 0; layer < num_shared; ++layer) {
    float* row = rows + layer * seq_len;
    const float mean = by_mean ? mean_of(row, seq_len) : 1.0f;
    const float divisor = mean == 0.0f ? 1.0f : mean;
    if (layer == 0) {
      for (int64_t i = 0; i < seq_len; ++i) rows[i] /= divisor;
    } else {
      for (int64_t i = 0; i < seq_len; ++i) rows[i] += row[i] / divisor;
    }
  }
  for (int64_t i = 0; i < seq_len; ++i) rows[i] /= static_cast<float>(num_shared);
}

// Both scores of `num_shared` layers -> one row each; rows close up.
void share(const EvictSimilar& p, float* similarity, float* value_norm) {
  const int64_t seq_len = p.scoring.seq_len;
  for (int64_t row = 0; row < p.moving.batch / p.num_shared; ++row) {
    const int64_t from = row * p.num_shared * seq_len, to = row * seq_len;
    average(similarity + from, p.num_shared, seq_len, false);
    average(value_norm + from, p.num_shared, seq_len, true);
    for (int64_t i = 0; i < seq_len && to != from; ++i) {
      similarity[to + i] = similarity[from + i];
      value_norm[to + i] = value_norm[from + i];
    }
  }
}

}  // namespace

void evict_similar_cpu(const EvictSimilar& params) {
  const EvictSimilar& p = params;
  const int64_t seq_len = p.scoring.seq_len, past = p.num_past, budget = p.moving.num_kept;
  const int64_t all_rows = p.moving.batch * p.moving.num_heads, num_rows = all_rows / p.num_shared;
  const Scratch<float> similarity(all_rows * seq_len), value_norm(all_rows * seq_len);
  ScoreRedundancy scoring = p.scoring;
  scoring.similarity = similarity;
  scoring.value_norm = value_norm;
  score_redundancy_cpu(scoring);
  if (p.num_shared > 1) share(p, similarity, value_norm);

  // Always kept: the recent frames, then also what is least similar to them.
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t i = past; i < seq_len; ++i) value_norm[row * seq_len + i] = kInfinity;
  }
  if (p.num_dissimilar > 0) {
    const Scratch<int32_t> chosen(num_rows * p.num_dissimilar), counts(num_rows);
    for (int64_t row = 0; row < num_rows; ++row) {
      float* scores = similarity + row * seq_len;
      for (int64_t i = 0; i < seq_len; ++i) scores[i] = i < past ? -scores[i] : -kInfinity;
    }
    select_top(similarity, num_rows, seq_len, p.num_dissimilar, chosen, counts);
    for (int64_t row = 0; row < num_rows; ++row) {
      const int32_t* indices = chosen + row * p.num_dissimilar;
      for (int32_t i = 0; i < counts[row]; ++i) value_norm[row * seq_len + indices[i]] = kInfinity;
    }
  }
  // One row for every group of layers, then copied: from the last on, so that none is lost before it is read.
  select_top(value_norm, num_rows, seq_len, budget, p.indices, p.counts);
  if (p.num_shared > 1) {
    for (int64_t row = all_rows; row-- > 0;) {
      const int64_t from = row / p.num_shared;
      p.counts[row] = p.counts[from];
      for (int64_t i = 0; i < budget; ++i) p.indices[row * budget + i] = p.indices[from * budget + i];
    }
  }
  compact_tokens_cpu(p.moving);
}

}  // namespace livevlm::LIVEVLM_CPU
