// SPDX-License-Identifier: Apache-2.0
// Similarity-based eviction: score_redundancy, select_tokens twice and compact_tokens in one.
// Meaning of the arguments: livevlm_kernels/evict_similar.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "kv_evict/compact_tokens.h"
#include "kv_evict/score_redundancy.h"

namespace livevlm {

struct EvictSimilar {
  ScoreRedundancy scoring;  // of all tokens against the last frames; where scores go is up to the kernel
  CompactTokens moving;     // keys, values, and more if wanted, to where `indices` says
  int64_t num_past;         // tokens before the recent frames
  int64_t num_dissimilar, num_shared;
  int32_t* indices;  // [batch, (num_heads,) moving.num_kept]
  int32_t* counts;   // [batch, (num_heads)]
};

LIVEVLM_CPU_KERNEL(evict_similar_cpu, EvictSimilar)

// `workspace`: evict_similar_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t evict_similar_workspace(const EvictSimilar& params);
void evict_similar_cuda(const EvictSimilar& params, void* workspace, void* stream);

}  // namespace livevlm
