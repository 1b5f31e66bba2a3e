// SPDX-License-Identifier: Apache-2.0
// Cosine of each key to the same patch in the recent frames, and the length of each value.
// Meaning of the arguments: livevlm_kernels/score_redundancy.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"
#include "common/tokens.h"

namespace livevlm {

struct ScoreRedundancy {
  Tokens k, v;              // [batch, seq_len, num_heads, head_dim]
  Tokens recent_k;          // [batch, num_frames, tokens_per_frame, num_heads, head_dim]
  int64_t stride_frame;     // of recent_k
  const int32_t* slots;     // [batch, seq_len]
  const int32_t* seq_lens;  // [batch] or null
  DType dtype;
  int64_t batch, seq_len, num_heads, head_dim, num_frames, tokens_per_frame;
  bool per_head;
  float* similarity;  // [batch, num_heads, seq_len] if per_head, else [batch, seq_len]
  float* value_norm;  // likewise
};

LIVEVLM_CPU_KERNEL(score_redundancy_cpu, ScoreRedundancy)

// `workspace`: score_redundancy_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t score_redundancy_workspace(const ScoreRedundancy& params);
void score_redundancy_cuda(const ScoreRedundancy& params, void* workspace, void* stream);

}  // namespace livevlm
