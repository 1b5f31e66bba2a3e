// SPDX-License-Identifier: Apache-2.0
// Moves kept tokens to the front, in place.
// Meaning of the arguments: livevlm_kernels/compact_tokens.py. Definition: livevlm_kernels/reference/.
#pragma once

#include <cstdint>

#include "common/cpu_dispatch.h"
#include "common/tokens.h"

namespace livevlm {

inline constexpr int kMaxCompactTensors = 8;

struct CompactTokens {
  Rows tensors[kMaxCompactTensors];
  int num_tensors;
  const int32_t* indices;  // [batch, num_heads, num_kept]; num_heads is 1 unless heads keep their own
  int64_t batch, num_heads, seq_len, num_kept;
};

LIVEVLM_CPU_KERNEL(compact_tokens_cpu, CompactTokens)

// `workspace`: compact_tokens_workspace(params) bytes. `stream` is a cudaStream_t.
int64_t compact_tokens_workspace(const CompactTokens& params);
void compact_tokens_cuda(const CompactTokens& params, void* workspace, void* stream);
// As the last kernel of another op: it overlaps with the one before it on the stream, by whose end the
// workspace must be zero.
void compact_tokens_behind(const CompactTokens& params, void* workspace, void* stream);

}  // namespace livevlm
