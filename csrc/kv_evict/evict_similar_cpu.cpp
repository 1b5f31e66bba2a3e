// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `evict_similar`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
//
// The ops it stands for, one after another: what fusing saves on a GPU, launches and small tensors, costs a
// CPU nothing next to reading the keys and values.
#include "common/cpu_lanes.h"
#include "common/parallel.h"
#include "kv_evict/compact_tokens.h"
#include "kv_evict/evict_similar.h"
#include "kv_evict/score_redundancy.h"
#include "kv_evict/select_tokens.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

void score(const EvictSimilar& p, int64_t past, float* similarity, float* value_norm) {
  Tokens recent_k = p.k;
  recent_k.data = static_cast<char*>(p.k.data) + past * p.k.stride_token * size_of(p.dtype);
  score_redundancy_cpu({
      .k = p.k,
      .v = p.v,
      .recent_k = recent_k,
      .stride_frame = p.tokens_per_frame * p.k.stride_token,
      .slots = p.slots,
      .seq_lens = nullptr,
      .dtype = p.dtype,
      .batch = p.batch,
      .seq_len = p.seq_len,
      .num_heads = p.num_heads,
      .head_dim = p.head_dim,
      .num_frames = p.num_frames,
      .tokens_per_frame = p.tokens_per_frame,
      .per_head = p.per_head,
      .similarity = similarity,
      .value_norm = value_norm,
  });
}

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
  for (int64_t row = 0; row < p.batch / p.num_shared; ++row) {
    const int64_t from = row * p.num_shared * p.seq_len, to = row * p.seq_len;
    average(similarity + from, p.num_shared, p.seq_len, false);
    average(value_norm + from, p.num_shared, p.seq_len, true);
    for (int64_t i = 0; i < p.seq_len && to != from; ++i) {
      similarity[to + i] = similarity[from + i];
      value_norm[to + i] = value_norm[from + i];
    }
  }
}

}  // namespace

void evict_similar_cpu(const EvictSimilar& params) {
  const EvictSimilar& p = params;
  const int64_t past = p.seq_len - p.num_frames * p.tokens_per_frame;
  const int64_t num_heads = p.per_head ? p.num_heads : 1;
  const int64_t num_rows = p.batch / p.num_shared * num_heads;
  const Scratch<float> similarity(p.batch * num_heads * p.seq_len);
  const Scratch<float> value_norm(p.batch * num_heads * p.seq_len);
  score(p, past, similarity, value_norm);
  if (p.num_shared > 1) share(p, similarity, value_norm);

  // Always kept: the recent frames, then also what is least similar to them.
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t i = past; i < p.seq_len; ++i) value_norm[row * p.seq_len + i] = kInfinity;
  }
  if (p.num_dissimilar > 0) {
    const Scratch<int32_t> chosen(num_rows * p.num_dissimilar), counts(num_rows);
    for (int64_t row = 0; row < num_rows; ++row) {
      float* scores = similarity + row * p.seq_len;
      for (int64_t i = 0; i < p.seq_len; ++i) scores[i] = i < past ? -scores[i] : -kInfinity;
    }
    select_top(similarity, num_rows, p.seq_len, p.num_dissimilar, chosen, counts);
    for (int64_t row = 0; row < num_rows; ++row) {
      const int32_t* indices = chosen + row * p.num_dissimilar;
      for (int32_t i = 0; i < counts[row]; ++i) value_norm[row * p.seq_len + indices[i]] = kInfinity;
    }
  }
  // One row for every group of layers, then copied: from the last on, so that none is lost before it is read.
  select_top(value_norm, num_rows, p.seq_len, p.budget, p.indices, p.counts);
  if (p.num_shared > 1) {
    for (int64_t row = p.batch; row-- > 0;) {
      const int64_t from = row / p.num_shared;
      p.counts[row] = p.counts[from];
      for (int64_t i = 0; i < p.budget; ++i) p.indices[row * p.budget + i] = p.indices[from * p.budget + i];
    }
  }
  CompactTokens moving{
      .tensors = {},
      .num_tensors = p.num_rows,
      .indices = p.indices,
      .batch = p.batch,
      .num_heads = num_heads,
      .seq_len = p.seq_len,
      .num_kept = p.budget,
  };
  for (int i = 0; i < p.num_rows; ++i) moving.tensors[i] = p.rows[i];
  compact_tokens_cpu(moving);
}

}  // namespace livevlm::LIVEVLM_CPU
