// SPDX-License-Identifier: Apache-2.0
// Replaces groups of tokens by their weighted means.
// Meaning of the arguments: livevlm_kernels/merge_tokens.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"
#include "common/tokens.h"

namespace livevlm {

struct MergeTokens {
  Tokens k, v;  // [batch, seq_len, num_heads, head_dim]
  DType dtype;
  int64_t batch, seq_len, num_heads, head_dim, num_groups;
  const int32_t* groups;    // [batch, seq_len]; exactly one of groups and indices is not null
  const int32_t* indices;   // [batch, num_groups]: survivors
  const float* sizes;       // [batch, seq_len] or null
  const float* weights;     // [batch, seq_len] or null
  const int32_t* seq_lens;  // [batch] or null
  void *k_out, *v_out;      // [batch, num_groups, num_heads, head_dim] of dtype, contiguous
  float* sizes_out;         // [batch, num_groups]
};

LIVEVLM_CPU_KERNEL(merge_tokens_cpu, MergeTokens)

// `workspace`: merge_tokens_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t merge_tokens_workspace(const MergeTokens& params);
void merge_tokens_cuda(const MergeTokens& params, void* workspace, void* stream);

}  // namespace livevlm
