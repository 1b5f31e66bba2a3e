// SPDX-License-Identifier: Apache-2.0
// Which kernels `retrieve_blocks` takes, how they split the work, and where in scratch memory their results
// lie.
#pragma once

#include <algorithm>

#include "block_attention/block_shares_fma.cuh"
#include "block_attention/retrieve_blocks.cuh"
#include "common/cuda_launch.cuh"
#include "kv_evict/score_tokens.h"

namespace livevlm {

// Thread blocks for one sequence: the SMs of an H100. Not of the GPU at hand, nor less for more sequences:
// sums of a split are rounded together, and what is selected must not depend on what else is in the batch.
inline constexpr int64_t kTargetBlocks = 132;
inline constexpr int64_t kMostWeights = 8192;  // floats of shared memory, if a head has not more
inline constexpr int64_t kManyBlocks = 3168;  // from here a warp scores several: 24 for each of kTargetBlocks
inline constexpr int64_t kFewBlocks = 4096;   // up to here one thread block finds the best of a row

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

inline bool has_bounds(const RetrieveBlocks& op) {
  return op.kind == BlockScore::kMinMax;
}

inline int64_t summary_length(const RetrieveBlocks& op) {
  return op.head_dim * (has_bounds(op) ? 2 : 1);
}

inline bool aligned_keys(const RetrieveBlocks& op) {
  const int64_t size = bytes_of(op.keys_dtype);
  return vectorised(op.keys, op.head_dim, size) && (!has_bounds(op) || op.upper * size % 16 == 0);
}

// Products of bfloat16 may split float32 summaries in two; of float16 they may not, which lacks their range.
// Bounds in float32 would need more registers than there are.
inline bool uses_mma(const RetrieveBlocks& op) {
  const bool split = op.q_dtype == DType::kBFloat16 && op.keys_dtype == DType::kFloat32 && !has_bounds(op);
  return op.q_dtype != DType::kFloat32 && (op.q_dtype == op.keys_dtype || split) &&
         (op.head_dim == 64 || op.head_dim == 128) && vectorised(op.q, op.head_dim, 2) && aligned_keys(op);
}

// Summaries that a warp of the tensor core kernel holds: as in ShareShape.
inline int64_t warp_keys(const RetrieveBlocks& op) {
  return summary_length(op) <= 128 && op.q_dtype == op.keys_dtype ? 32 : 16;
}

inline void plan_share_splits(RetrieveKernel& kernel) {
  const RetrieveBlocks& op = kernel.op;
  const int64_t wanted = ceil_div(kernel.num_blocks * op.num_heads, kTargetBlocks);
  const int64_t keys = uses_mma(op) ? warp_keys(op) : kFmaSummaries;
  kernel.key_warps = !uses_mma(op) || wanted <= keys ? 1 : wanted < 8 * keys ? 2 : 4;
  const int64_t tile = keys * kernel.key_warps;
  kernel.split_blocks = static_cast<int32_t>(ceil_div(wanted, tile) * tile);
  kernel.num_splits = static_cast<int32_t>(ceil_div(kernel.num_blocks, kernel.split_blocks));
}

// Attention to tokens, without RoPE: queries and keys are not rotated.
inline ScoreTokens mass_of(const RetrieveBlocks& op, float* out) {
  ScoreTokens mass{};
  mass.q = op.q;
  mass.k = op.keys;
  mass.dtype = op.keys_dtype;
  mass.batch = op.batch;
  mass.num_queries = op.num_queries;
  mass.seq_len = op.num_entries;
  mass.num_heads = op.num_heads;
  mass.group_size = op.group_size;
  mass.head_dim = op.head_dim;
  mass.seq_lens = op.seq_lens;
  mass.sm_scale = op.sm_scale;
  mass.per_head = true;
  mass.num_shared = 1;
  mass.num_splits = ceil_div(kTargetBlocks, op.num_heads);
  mass.out = out;
  return mass;
}

// Splits scratch memory into pieces that are aligned to 256 bytes.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    char* taken = memory_ + used_;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(taken);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

struct RetrievalPlan {
  RetrieveKernel kernel;
  bool mean_query, add_parts;
  void* mass_workspace;
  int64_t bytes;
};

inline RetrievalPlan plan_retrieval(const RetrieveBlocks& op, void* workspace) {
  RetrievalPlan plan{};
  Scratch scratch(workspace);
  RetrieveKernel& kernel = plan.kernel;
  kernel.op = op;
  kernel.num_blocks =
      static_cast<int32_t>(op.num_entries / op.block_size + (op.num_entries % op.block_size != 0));
  kernel.added_heads = 1;
  const int64_t heads = op.batch * op.num_heads, rows = op.per_head ? heads : op.batch;
  if (!op.softmax) {
    kernel.query = op.q;
    kernel.query_dtype = op.q_dtype;
    const int64_t qo_heads = op.num_heads * op.group_size;
    // Of one query too if blocks are many: summaries are on their way by the time that the mean is ready.
    plan.mean_query = op.num_queries > 1 || kernel.num_blocks >= kManyBlocks;
    if (plan.mean_query) {
      kernel.means = scratch.take<float>(op.batch * qo_heads * op.head_dim);
      kernel.query = {kernel.means, qo_heads * op.head_dim, 0, op.head_dim, 1};
      kernel.query_dtype = DType::kFloat32;
    }
    kernel.row_heads = static_cast<int32_t>(op.per_head ? 1 : op.num_heads);
    kernel.chunk_heads =
        static_cast<int32_t>(std::clamp<int64_t>(kMostWeights / summary_length(op), 1, kernel.row_heads));
  } else {
    kernel.scale = op.sm_scale * 1.4426950408889634f;
    kernel.num_rows = static_cast<int32_t>(op.num_queries * op.group_size);
    plan.add_parts = op.kind == BlockScore::kMass;
    kernel.part_count = op.kind == BlockScore::kMass ? op.num_entries : kernel.num_blocks;
    kernel.parts = scratch.take<float>(heads * kernel.part_count);
    if (op.kind == BlockScore::kMass) {
      plan.mass_workspace = scratch.take<char>(score_tokens_workspace(mass_of(op, kernel.parts)));
    } else {
      plan_share_splits(kernel);
      kernel.partials = scratch.take<float2>(heads * kernel.num_splits * kernel.num_rows);
    }
    if (!plan.add_parts && !op.per_head) kernel.added_heads = static_cast<int32_t>(op.num_heads);
  }
  kernel.scores =
      op.softmax && !plan.add_parts ? kernel.parts : scratch.take<float>(rows * kernel.num_blocks);
  plan.bytes = scratch.used();
  return plan;
}

}  // namespace livevlm
