// SPDX-License-Identifier: Apache-2.0
// Similarity-based eviction: score_redundancy, select_tokens twice and compact_tokens in one.
// Meaning of the arguments: livevlm_kernels/evict_similar.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"
#include "common/tokens.h"
#include "kv_evict/compact_tokens.h"

namespace livevlm {

struct EvictSimilar {
  Tokens k, v;                    // [batch, seq_len, num_heads, head_dim]
  Rows rows[kMaxCompactTensors];  // what moves, per head if per_head: keys, values, and more if wanted
  int num_rows;
  const int32_t* slots;  // [batch, seq_len]
  DType dtype;
  int64_t batch, seq_len, num_heads, head_dim;
  int64_t budget, num_frames, tokens_per_frame, num_dissimilar, num_shared;
  bool per_head;
  int32_t* indices;  // [batch, (num_heads,) budget]
  int32_t* counts;   // [batch, (num_heads)]
};

LIVEVLM_CPU_KERNEL(evict_similar_cpu, EvictSimilar)

// `workspace`: evict_similar_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t evict_similar_workspace(const EvictSimilar& params);
void evict_similar_cuda(const EvictSimilar& params, void* workspace, void* stream);

}  // namespace livevlm
