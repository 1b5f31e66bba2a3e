// SPDX-License-Identifier: Apache-2.0
// Scores, chooses and moves, one launch after another for all layers.
#include "kv_evict/evict_similar.cuh"

namespace livevlm {
namespace {

struct Plan {
  EvictKernel choice;  // its op has scores to write to
  void* scoring_scratch;
  int64_t bytes;  // of the workspace
};

// Layers, or heads of them.
int64_t num_rows(const EvictSimilar& op) {
  return op.moving.batch * op.moving.num_heads;
}

Plan plan(const EvictSimilar& op, char* workspace) {
  const int64_t scores = num_rows(op) * op.scoring.seq_len * 4;
  Plan plan{};
  EvictKernel& choice = plan.choice;
  choice.op = op;
  choice.words = ceil_div(op.scoring.seq_len, 32);
  choice.moving_words = compact_tokens_workspace(op.moving) / 4;

  const auto take = [&](auto*& pointer, int64_t bytes) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + plan.bytes);
    plan.bytes += ceil_div(bytes, 16) * 16;
  };
  take(choice.op.scoring.similarity, scores);
  take(choice.op.scoring.value_norm, scores);
  take(choice.inverses, op.num_shared > 1 ? op.moving.batch * 4 : 0);
  take(choice.chosen, num_rows(op) / op.num_shared * choice.words * 4);
  take(plan.scoring_scratch, score_redundancy_workspace(op.scoring));
  take(choice.moving_scratch, choice.moving_words * 4);
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
  const int64_t seq_len = op.scoring.seq_len;
  score_redundancy_cuda(choice.op.scoring, planned.scoring_scratch, stream);
  if (op.num_shared > 1) {
    launch_kernel(layer_means_kernel, grid_of(op.moving.batch), kRowThreads, 0, cuda_stream, choice,
                  "evict_similar: means of layers");
    launch_kernel(average_layers_kernel,
                  grid_of(op.moving.batch / op.num_shared * ceil_div(seq_len, kAverageThreads)),
                  kAverageThreads, 0, cuda_stream, choice, "evict_similar: average of layers");
  }
  dispatch_staged(seq_len, sizeof(TopShared), [&](auto staged, int64_t shared_bytes) {
    launch_overlapping(select_dissimilar_kernel<decltype(staged)::value>,
                       grid_of(num_rows(op) / op.num_shared), kRowThreads, static_cast<size_t>(shared_bytes),
                       cuda_stream, choice, "evict_similar: choice");
  });
  compact_tokens_behind(op.moving, choice.moving_scratch, stream);
}

}  // namespace livevlm
