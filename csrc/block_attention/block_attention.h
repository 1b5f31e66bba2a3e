// SPDX-License-Identifier: Apache-2.0
// Attention over the blocks of the memory that a table names.
// Meaning of the arguments: livevlm_kernels/block_attention.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"
#include "common/tokens.h"

namespace livevlm {

// How the pools hold keys and values: see livevlm_kernels/quantize_blocks.py.
enum class PoolFormat { kFloats, kFp8, kInt4 };

struct BlockAttention {
  Tokens q;     // [1, total_q, num_heads * group_size, head_dim]
  Tokens k, v;  // [num_blocks, block_size, num_heads, head_dim]: a block is what `Tokens` calls a batch entry
  DType dtype;  // of q and out; of k and v, too, if they are floats
  PoolFormat format;              // else k and v are bytes
  const void *k_scale, *v_scale;  // contiguous; null with floats
  int64_t total_q, num_blocks, block_size, num_heads, group_size, head_dim;
  int64_t batch, max_blocks;
  const int32_t* block_table;                     // [batch, (num_heads,) max_blocks]
  int64_t table_stride_batch, table_stride_head;  // in entries; entries of a row are neighbours
  const int32_t* seq_lens;                        // [batch]
  const int32_t* cu_seqlens_q;                    // [batch + 1] or null: total_q / batch queries each
  const void* positions;                          // [num_blocks, block_size] or null
  bool positions_int64;                           // else int32
  const void* cos_sin_cache;                      // [max_position, head_dim] or null: no RoPE
  bool cos_sin_half;                              // float16, else float32
  int64_t max_position;
  const void* q_positions;  // [total_q] or null: the queries are rotated already
  bool q_positions_int64;   // else int32
  bool packed;              // a key's position is its number in table order
  float sm_scale;
  bool causal;
  int64_t window;  // 0: none
  void* out;       // [total_q, num_heads * group_size, head_dim], contiguous
  float* lse;      // [total_q, num_heads * group_size]
};

LIVEVLM_CPU_KERNEL(block_attention_cpu, BlockAttention)

// `workspace`: block_attention_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t block_attention_workspace(const BlockAttention& params);
void block_attention_cuda(const BlockAttention& params, void* workspace, void* stream);

}  // namespace livevlm
