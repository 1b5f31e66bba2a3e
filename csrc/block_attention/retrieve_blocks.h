// SPDX-License-Identifier: Apache-2.0
// Which blocks of the memory a question needs.
// Meaning of the arguments: livevlm_kernels/retrieve_blocks.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/dtype.h"
#include "common/tokens.h"

namespace livevlm {

enum class BlockScore : int64_t { kMean, kMinMax, kMass };

struct RetrieveBlocks {
  Tokens q;       // [batch, num_queries, num_heads * group_size, head_dim]
  Tokens keys;    // [batch, num_entries, num_heads, head_dim]: mean keys, lower bounds, or keys of tokens
  int64_t upper;  // kMinMax: elements from a lower bound to its upper bound
  DType q_dtype, keys_dtype;
  BlockScore kind;
  bool softmax;
  int64_t batch, num_queries, num_entries, num_heads, group_size, head_dim;
  const int32_t* seq_lens;  // [batch] or null: num_entries
  int64_t num_selected, block_size, num_sink_blocks, num_recent_blocks;
  double ratio;  // above 1: no limit
  bool per_head;
  float sm_scale;
  int32_t* block_table;  // [batch, (num_heads,) num_selected]
  int32_t* counts;       // [batch, (num_heads)]
};

LIVEVLM_CPU_KERNEL(retrieve_blocks_cpu, RetrieveBlocks)

// `workspace`: retrieve_blocks_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t retrieve_blocks_workspace(const RetrieveBlocks& params);
void retrieve_blocks_cuda(const RetrieveBlocks& params, void* workspace, void* stream);

}  // namespace livevlm
