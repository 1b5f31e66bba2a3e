// SPDX-License-Identifier: Apache-2.0
// Blocks of keys and values in 8 or 4 bits.
// Meaning of the arguments: livevlm_kernels/quantize_blocks.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"

namespace livevlm {

struct QuantizeBlocks {
  struct Side {
    const void* data;  // [batch, num_blocks, block_size, num_heads, head_dim], strides in elements
    int64_t stride_batch, stride_block, stride_token, stride_head, stride_dim;
    uint8_t* codes;  // [batch, num_blocks, block_size, num_heads, head_dim or head_dim / 2], contiguous
    void* scale;     // contiguous
  };
  Side k, v;
  DType dtype;
  int64_t batch, num_blocks, block_size, num_heads, head_dim;
  const void* positions;    // [batch, num_blocks, block_size] or null
  bool positions_int64;     // else int32
  int64_t positions_batch;  // stride, 0: the same for all
  bool int4;                // else fp8
};

LIVEVLM_CPU_KERNEL(quantize_blocks_cpu, QuantizeBlocks)

// `stream` is a cudaStream_t.
void quantize_blocks_cuda(const QuantizeBlocks& params, void* stream);

}  // namespace livevlm
