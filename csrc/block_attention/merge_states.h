// SPDX-License-Identifier: Apache-2.0
// Joins attention over parts of the keys into attention over all of them.
// Meaning of the arguments: livevlm_kernels/merge_states.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"
#include "common/tokens.h"

namespace livevlm {

struct MergeStates {
  Tokens outs;  // [num_parts, total_q, num_heads, head_dim]
  DType dtype;  // of outs and out
  const float* lses;
  int64_t lse_stride_part, lse_stride_token, lse_stride_head;
  int64_t num_parts, total_q, num_heads, head_dim;
  void* out;   // [total_q, num_heads, head_dim], contiguous
  float* lse;  // [total_q, num_heads]
};

LIVEVLM_CPU_KERNEL(merge_states_cpu, MergeStates)

// `workspace`: merge_states_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t merge_states_workspace(const MergeStates& params);
void merge_states_cuda(const MergeStates& params, void* workspace, void* stream);

}  // namespace livevlm
