// SPDX-License-Identifier: Apache-2.0
// Top-k under a budget, or top-k and the best of every bucket, exact; indices in ascending order.
// Meaning of the arguments: livevlm_kernels/select_tokens.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"

namespace livevlm {

struct SelectTokens {
  const void* scores;  // [batch, seq_len], strides in elements
  DType dtype;
  int64_t batch, seq_len;
  int64_t stride_batch, stride_token;
  const int32_t* seq_lens;  // [batch] or null
  const int32_t* buckets;   // [batch, seq_len] or null: by place
  int64_t budget, num_top, num_buckets, bucket_capacity;
  int32_t* indices;  // [batch, budget]
  int32_t* counts;   // [batch]
};

LIVEVLM_CPU_KERNEL(select_tokens_cpu, SelectTokens)

// `workspace`: select_tokens_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t select_tokens_workspace(const SelectTokens& params);
void select_tokens_cuda(const SelectTokens& params, void* workspace, void* stream);

}  // namespace livevlm
