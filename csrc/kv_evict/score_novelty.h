// SPDX-License-Identifier: Apache-2.0
// Distance of each token to the mean of its patch slot, and to an earlier token.
// Meaning of the arguments: livevlm_kernels/score_novelty.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"
#include "common/tokens.h"

namespace livevlm {

struct ScoreNovelty {
  Tokens x;                 // [batch, seq_len, num_heads, head_dim]
  Tokens usual;             // [batch, tokens_per_frame, num_heads, head_dim], float32
  const int32_t* slots;     // [batch, seq_len]
  const int32_t* previous;  // [batch, seq_len]
  const int32_t* seq_lens;  // [batch] or null
  DType dtype;              // of x
  int64_t batch, seq_len, num_heads, head_dim, tokens_per_frame;
  float* change;  // [batch, seq_len]
  float* step;    // [batch, seq_len]
};

LIVEVLM_CPU_KERNEL(score_novelty_cpu, ScoreNovelty)

// `stream` is a cudaStream_t.
void score_novelty_cuda(const ScoreNovelty& params, void* stream);

}  // namespace livevlm
