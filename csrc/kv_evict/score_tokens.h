// SPDX-License-Identifier: Apache-2.0
// Attention that a few queries pay to each key, without ever storing it query by query.
// Meaning of the arguments: livevlm_kernels/score_tokens.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"
#include "common/tokens.h"

namespace livevlm {

struct ScoreTokens {
  Tokens q;  // [batch, num_queries, num_heads * group_size, head_dim]
  Tokens k;  // [batch, seq_len, num_heads, head_dim]
  DType dtype;
  int64_t batch, num_queries, seq_len, num_heads, group_size, head_dim;
  const int32_t* seq_lens;     // [batch] or null
  const void* positions;       // [batch, seq_len] or null: no RoPE
  bool positions_int64;        // else int32
  const float* cos_sin_cache;  // [max_position, head_dim] or null
  int64_t max_position;
  float sm_scale;
  bool causal, per_head;
  int64_t num_shared;
  float* out;              // [batch, num_heads, seq_len] if per_head, else [batch / num_shared, seq_len]
  int64_t num_splits = 8;  // of the keys, or more: see plan_splits in score_tokens.cu
};

LIVEVLM_CPU_KERNEL(score_tokens_cpu, ScoreTokens)

// `workspace`: score_tokens_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t score_tokens_workspace(const ScoreTokens& params);
void score_tokens_cuda(const ScoreTokens& params, void* workspace, void* stream);

}  // namespace livevlm
