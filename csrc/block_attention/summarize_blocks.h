// SPDX-License-Identifier: Apache-2.0
// Block representatives of cached keys: their mean, or their element-wise minimum and maximum.
// Meaning of the arguments: livevlm_kernels/summarize_blocks.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"

namespace livevlm {

struct SummarizeBlocks {
  const void* k;  // [batch, seq_len, num_heads, head_dim], strides in elements
  DType dtype;
  int64_t batch, seq_len, num_heads, head_dim;
  int64_t stride_batch, stride_token, stride_head, stride_dim;
  const int32_t* seq_lens;     // [batch] or null
  const int32_t* first_token;  // [batch] or null
  int64_t block_size, num_blocks;
  bool minmax;
  float* out;  // [batch, num_blocks, (2,) num_heads, head_dim], contiguous
};

LIVEVLM_CPU_KERNEL(summarize_blocks_cpu, SummarizeBlocks)

// `stream` is a cudaStream_t.
void summarize_blocks_cuda(const SummarizeBlocks& params, void* stream);

}  // namespace livevlm
