// SPDX-License-Identifier: Apache-2.0
// Scores, chooses and moves, one launch after another for all layers.
#include "kv_evict/evict_similar.cuh"

#include "kv_evict/compact_tokens.h"
#include "kv_evict/score_redundancy.h"

namespace livevlm {
namespace {

struct Plan {
  ScoreRedundancy scoring;
  EvictKernel choice;
  CompactTokens moving;
  void *scoring_scratch, *moving_scratch;
  int64_t bytes;  // of the workspace
};

Plan plan(const EvictSimilar& op, char* workspace) {
  const int64_t heads = op.per_head ? op.num_heads : 1, rows = op.batch * heads;
  const int64_t past = op.seq_len - op.num_frames * op.tokens_per_frame;
  Plan plan{};
  Tokens recent = op.k;
  recent.data = static_cast<char*>(op.k.data) +
                past * op.k.stride_token * (op.dtype == DType::kFloat32 ? int64_t{4} : int64_t{2});
  plan.scoring = {.k = op.k,
                  .v = op.v,
                  .recent_k = recent,
                  .stride_frame = op.tokens_per_frame * op.k.stride_token,
                  .slots = op.slots,
                  .seq_lens = nullptr,
                  .dtype = op.dtype,
                  .batch = op.batch,
                  .seq_len = op.seq_len,
                  .num_heads = op.num_heads,
                  .head_dim = op.head_dim,
                  .num_frames = op.num_frames,
                  .tokens_per_frame = op.tokens_per_frame,
                  .per_head = op.per_head,
                  .similarity = nullptr,
                  .value_norm = nullptr};
  plan.moving = {.tensors = {},
                 .num_tensors = op.num_rows,
                 .indices = op.indices,
                 .batch = op.batch,
                 .num_heads = heads,
                 .seq_len = op.seq_len,
                 .num_kept = op.budget};
  for (int i = 0; i < op.num_rows; ++i) plan.moving.tensors[i] = op.rows[i];
  plan.choice.op = op;
  plan.choice.words = ceil_div(op.seq_len, 32);

  const auto take = [&](auto*& pointer, int64_t bytes) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + plan.bytes);
    plan.bytes += ceil_div(bytes, 16) * 16;
  };
  take(plan.choice.similarity, rows * op.seq_len * 4);
  take(plan.choice.norm, rows * op.seq_len * 4);
  take(plan.choice.inverses, op.num_shared > 1 ? op.batch * 4 : 0);
  take(plan.choice.chosen, rows / op.num_shared * plan.choice.words * 4);
  take(plan.scoring_scratch, score_redundancy_workspace(plan.scoring));
  take(plan.moving_scratch, compact_tokens_workspace(plan.moving));
  plan.scoring.similarity = plan.choice.similarity;
  plan.scoring.value_norm = plan.choice.norm;
  return plan;
}

}  // namespace

int64_t evict_similar_workspace(const EvictSimilar& op) {
  return plan(op, nullptr).bytes;
}

void evict_similar_cuda(const EvictSimilar& op, void* workspace, void* stream) {
  const Plan planned = plan(op, static_cast<char*>(workspace));
  const EvictKernel& choice = planned.choice;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  score_redundancy_cuda(planned.scoring, planned.scoring_scratch, stream);
  const int64_t units = op.batch / op.num_shared;
  if (op.num_shared > 1) {
    launch_kernel(layer_means_kernel, grid_of(op.batch), kRowThreads, 0, cuda_stream, choice,
                  "evict_similar: means of layers");
    launch_kernel(average_layers_kernel, grid_of(units * ceil_div(op.seq_len, kAverageThreads)),
                  kAverageThreads, 0, cuda_stream, choice, "evict_similar: average of layers");
  }
  dispatch_staged(op.seq_len, sizeof(TopShared), [&](auto staged, int64_t shared_bytes) {
    launch_kernel(select_dissimilar_kernel<decltype(staged)::value>,
                  grid_of(units * (op.per_head ? op.num_heads : 1)), kRowThreads,
                  static_cast<size_t>(shared_bytes), cuda_stream, choice, "evict_similar: choice");
  });
  compact_tokens_cuda(planned.moving, planned.moving_scratch, stream);
}

}  // namespace livevlm
