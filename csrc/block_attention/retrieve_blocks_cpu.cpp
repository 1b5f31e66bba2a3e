// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `retrieve_blocks`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
//
// First the scores of all entries, one KV head of one sequence a thread, then the selection. `score_tokens`
// finds the attention mass, `select_tokens` selects.
#include <cmath>

#include "block_attention/block_scores.h"
#include "block_attention/retrieve_blocks.h"
#include "common/cpu_lanes.h"
#include "common/parallel.h"
#include "kv_evict/score_tokens.h"
#include "kv_evict/select_tokens.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

int64_t num_blocks_of(const RetrieveBlocks& p) {
  return (p.num_entries - 1) / p.block_size + 1;
}

// The attention mass of each token, [batch, num_heads, num_entries].
void find_mass(const RetrieveBlocks& p, float* scores) {
  score_tokens_cpu({.q = p.q,
                    .k = p.keys,
                    .dtype = p.keys_dtype,
                    .batch = p.batch,
                    .num_queries = p.num_queries,
                    .seq_len = p.num_entries,
                    .num_heads = p.num_heads,
                    .group_size = p.group_size,
                    .head_dim = p.head_dim,
                    .seq_lens = p.seq_lens,
                    .positions = nullptr,
                    .positions_int64 = false,
                    .cos_sin_cache = nullptr,
                    .max_position = 0,
                    .sm_scale = p.sm_scale,
                    .causal = false,
                    .per_head = true,
                    .num_shared = 1,
                    .out = scores});
}

// The scores of one row of the table: of one KV head if `per_head`, else the sum over all of them.
// entries: [num_heads, num_entries] of a sequence. out: [num_blocks_of(p)].
void one_row(const RetrieveBlocks& p, int64_t length, int64_t head, const float* entries, float* out) {
  const int64_t first = p.per_head ? head : 0, last = p.per_head ? head + 1 : p.num_heads;
  for (int64_t block = 0; block * p.block_size < length; ++block) {
    const int64_t begin = block * p.block_size, rest = length - begin;
    const int64_t count = rest < p.block_size ? rest : p.block_size;
    float total = 0.0f;
    for (int64_t h = first; h < last; ++h) {
      float score = 0.0f;
      for (int64_t i = begin; i < begin + count; ++i) score += entries[h * p.num_entries + i];
      total += score;
    }
    out[block] = total;
  }
}

// scores: of one row of the table.
void select_blocks(const RetrieveBlocks& p, int64_t length, float* scores, int32_t* table, int32_t* counts) {
  const int64_t num_valid = length == 0 ? 0 : (length - 1) / p.block_size + 1;
  int64_t width = num_valid < p.num_selected ? num_valid : p.num_selected;
  if (p.ratio <= 1.0) {
    // 1e-6 keeps 0.07 * 100 = 7.000000000000001 at 7 blocks. Volatile: a fused multiply-add would not round
    // the product, as the other backends do.
    const volatile double share = static_cast<double>(num_valid) * p.ratio;
    const auto wanted = static_cast<int64_t>(std::ceil(share - 1e-6));
    const int64_t least = p.num_sink_blocks + p.num_recent_blocks, most = wanted > least ? wanted : least;
    width = width < most ? width : most;
  }
  for (int64_t block = 0; block < num_valid; ++block) {
    if (block < p.num_sink_blocks || block >= num_valid - p.num_recent_blocks) scores[block] = kInfinity;
  }
  *counts = 0;
  if (width > 0) {
    select_tokens_cpu({.scores = scores,
                       .dtype = DType::kFloat32,
                       .batch = 1,
                       .seq_len = num_valid,
                       .stride_batch = num_valid,
                       .stride_token = 1,
                       .seq_lens = nullptr,
                       .buckets = nullptr,
                       .budget = width,
                       .num_top = width,
                       .num_buckets = 1,
                       .bucket_capacity = 1,
                       .indices = table,
                       .counts = counts});
  }
  for (int64_t i = width; i < p.num_selected; ++i) table[i] = -1;
}

}  // namespace

void retrieve_blocks_cpu(const RetrieveBlocks& params) {
  constexpr int64_t kGrain = 32768;  // multiplications, or additions, worth waking a thread for
  const RetrieveBlocks& p = params;
  const Scratch<float> entries(p.batch * p.num_heads * p.num_entries);
  if (p.kind == BlockScore::kMass) {
    find_mass(p, entries);
  } else {
    const int64_t work = rows_of(p) * p.num_entries * depth_of(p);
    dispatch_float(p.q_dtype, [&](auto q_tag) {
      dispatch_float(p.keys_dtype, [&](auto k_tag) {
        using Q = typename decltype(q_tag)::type;
        using K = typename decltype(k_tag)::type;
        parallel_for(0, p.batch * p.num_heads, kGrain / work + 1, [&](int64_t first, int64_t last) {
          ScoreWorkspace workspace(p);
          for (int64_t i = first; i < last; ++i)
            one_head<Q, K>(p, workspace, i / p.num_heads, i % p.num_heads, entries + i * p.num_entries);
        });
      });
    });
  }
  const int64_t num_rows = p.per_head ? p.num_heads : 1;  // of the table for a sequence
  const int64_t work = p.num_entries * (p.per_head ? 1 : p.num_heads);
  parallel_for(0, p.batch * num_rows, kGrain / work + 1, [&](int64_t first, int64_t last) {
    const Scratch<float> scores(num_blocks_of(p));
    for (int64_t i = first; i < last; ++i) {
      const int64_t batch = i / num_rows, length = length_of(p, batch);
      one_row(p, length, i % num_rows, entries + batch * p.num_heads * p.num_entries, scores);
      select_blocks(p, length, scores, p.block_table + i * p.num_selected, p.counts + i);
    }
  });
}

}  // namespace livevlm::LIVEVLM_CPU
