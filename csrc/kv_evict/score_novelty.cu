// SPDX-License-Identifier: Apache-2.0
#include "kv_evict/score_novelty.cuh"

#include <algorithm>

#include "common/cuda_launch.cuh"

namespace livevlm {
namespace {

// Calls body(TypeTag<T>{}, IntTag<elements of a load>{}, IntTag<lanes>{}).
template <typename Body>
void dispatch(const ScoreNovelty& op, Body body) {
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kSize = kVectorSize<T>;
    const bool wide =
        vectorised(op.x, op.head_dim, sizeof(T)) && vectorised(op.usual, op.head_dim, sizeof(float));
    if (!wide) return body(type, IntTag<1>{}, IntTag<32>{});
    if (op.num_heads * op.head_dim <= 16 * kSize) return body(type, IntTag<kSize>{}, IntTag<16>{});
    return body(type, IntTag<kSize>{}, IntTag<32>{});
  });
}

// Blocks have whole slots, and parts of sequences only where there are fewer slots than blocks.
NoveltyKernel plan_of(const ScoreNovelty& op) {
  constexpr int64_t kTokensPerBlock = 512;  // few blocks: each looks at the slots of all tokens
  const int64_t blocks = ceil_div(op.seq_len, kTokensPerBlock);
  const int64_t slots_per_group = ceil_div(op.tokens_per_frame, std::min(op.tokens_per_frame, blocks));
  const int64_t groups = ceil_div(op.tokens_per_frame, slots_per_group);
  const int64_t splits = std::max<int64_t>(1, blocks / groups);
  return {op, static_cast<uint32_t>(groups), static_cast<uint32_t>(slots_per_group),
          static_cast<uint32_t>(splits), ceil_div(op.seq_len, splits)};
}

}  // namespace

void score_novelty_cuda(const ScoreNovelty& op, void* stream) {
  const NoveltyKernel kernel = plan_of(op);
  const dim3 grid = grid_of(op.batch * kernel.groups * kernel.splits);
  dispatch(op, [&](auto type, auto size, auto lanes) {
    using T = typename decltype(type)::type;
    launch_kernel(score_novelty_kernel<T, decltype(size)::value, decltype(lanes)::value>, grid,
                  kNoveltyThreads, 0, static_cast<cudaStream_t>(stream), kernel, "score_novelty");
  });
}

}  // namespace livevlm
