// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "common/cuda_launch.cuh"
#include "kv_evict/score_fma.cuh"
#include "kv_evict/score_mma.cuh"
#ifndef LIVEVLM_EMULATED
#include "kv_evict/score_wgmma.cuh"
#endif

namespace livevlm {
namespace {

constexpr int kAverageThreads = 256;

bool uses_mma(const ScoreTokens& op) {
  return op.dtype != DType::kFloat32 && (op.head_dim == 64 || op.head_dim == 128) &&
         vectorised(op.q, op.head_dim, 2) && vectorised(op.k, op.head_dim, 2);
}

// Warpgroup products exist on Hopper alone. LIVEVLM_SCORE=mma in the environment turns them off, so that
// tests on Hopper reach the other kernel too.
[[maybe_unused]] bool uses_wgmma(const ScoreTokens& op) {
#ifdef LIVEVLM_EMULATED
  static_cast<void>(op);
  return false;
#else
  static const bool allowed = [] {
    const char* wanted = std::getenv("LIVEVLM_SCORE");
    return !(wanted && std::string_view(wanted) == "mma");
  }();
  return allowed && uses_mma(op) && has_warpgroup_products();
#endif
}

// `num_splits` splits of the keys, but none longer than kMostTokens. This follows from the sequence's length
// alone: sums of a split are rounded together, and a sequence's scores must not depend on what else is in the
// batch.
void plan_splits(ScoreKernel& kernel, int64_t tile_tokens) {
  constexpr int64_t kMostTokens = 2304;
  const int64_t tiles = ceil_div(kernel.op.seq_len, tile_tokens);
  const int64_t per_split =
      std::clamp<int64_t>(ceil_div(tiles, kernel.op.num_splits), 1, kMostTokens / tile_tokens);
  kernel.split_tokens = static_cast<int32_t>(per_split * tile_tokens);
  kernel.num_splits = static_cast<int32_t>(ceil_div(kernel.op.seq_len, kernel.split_tokens));
}

// Keys that a block goes through at a time.
int64_t tile_tokens(const ScoreTokens& op) {
#ifndef LIVEVLM_EMULATED
  if (uses_wgmma(op)) return kWgmmaTileTokens;
#endif
  return uses_mma(op) ? kTileTokens : 8 * kFmaTokens;
}

struct Plan {
  ScoreKernel kernel;
  int64_t bytes;
};

Plan plan(const ScoreTokens& op, char* workspace) {
  Plan plan{};
  ScoreKernel& kernel = plan.kernel;
  kernel.op = op;
  kernel.scale = op.sm_scale * 1.4426950408889634f;
  kernel.num_rows = static_cast<int32_t>(op.num_queries * op.group_size);
  plan_splits(kernel, tile_tokens(op));
  const int64_t heads = op.batch * op.num_heads;
  const int64_t partials = heads * kernel.num_splits * kernel.num_rows * static_cast<int64_t>(sizeof(float2));
  const int64_t scores = heads * op.seq_len * static_cast<int64_t>(sizeof(float));
  kernel.partials = reinterpret_cast<float2*>(workspace);
  kernel.scores = op.per_head ? op.out : reinterpret_cast<float*>(workspace + partials);
  plan.bytes = partials + (op.per_head ? 0 : scores);
  return plan;
}

// As many rows at a time as shared memory holds, in blocks of about the same size.
void plan_rows(ScoreKernel& kernel, int64_t most, int64_t multiple) {
  const int64_t blocks = ceil_div(kernel.num_rows, most / multiple * multiple);
  kernel.block_rows = static_cast<int32_t>(ceil_div(ceil_div(kernel.num_rows, blocks), multiple) * multiple);
}

#ifndef LIVEVLM_EMULATED
template <typename T, int kDim>
void launch_wgmma(ScoreKernel kernel, dim3 grid, cudaStream_t stream) {
  constexpr int64_t kBytes = kWgmmaRowBytes<kDim>;
  plan_rows(kernel, max_shared_bytes() / kBytes, kGroupRows);
  const auto shared = static_cast<size_t>(kernel.block_rows * kBytes);
  launch_kernel(score_wgmma_kernel<T, kDim, false>, grid, kWgmmaThreads, shared, stream, kernel,
                "score_tokens: sums");
  launch_overlapping(score_wgmma_kernel<T, kDim, true>, grid, kWgmmaThreads, shared, stream, kernel,
                     "score_tokens: shares");
}
#endif

template <typename T, int kDim>
void launch_mma(ScoreKernel kernel, dim3 grid, cudaStream_t stream) {
  constexpr int64_t kBytes = kRowBytes<kDim> + 2 * kScoreWarps * 4;  // of a row
  plan_rows(kernel, max_shared_bytes() / kBytes, kRowsAtOnce);
  const auto shared = static_cast<size_t>(kernel.block_rows * kBytes);
  launch_kernel(score_mma_kernel<T, kDim, false>, grid, kScoreThreads, shared, stream, kernel,
                "score_tokens: sums");
  launch_overlapping(score_mma_kernel<T, kDim, true>, grid, kScoreThreads, shared, stream, kernel,
                     "score_tokens: shares");
}

template <typename T>
void launch_fma(ScoreKernel kernel, dim3 grid, cudaStream_t stream) {
  constexpr int64_t kMostRows = 2048;
  plan_rows(kernel, std::min<int64_t>(kernel.num_rows, kMostRows), 1);
  const auto shared =
      static_cast<size_t>(score_fma_floats(kernel.op.head_dim, kernel.block_rows)) * sizeof(float);
  launch_kernel(score_fma_kernel<T, false>, grid, kFmaScoreThreads, shared, stream, kernel,
                "score_tokens: sums");
  launch_kernel(score_fma_kernel<T, true>, grid, kFmaScoreThreads, shared, stream, kernel,
                "score_tokens: shares");
}

}  // namespace

int64_t score_tokens_workspace(const ScoreTokens& op) {
  return plan(op, nullptr).bytes;
}

void score_tokens_cuda(const ScoreTokens& op, void* workspace, void* stream) {
  const ScoreKernel kernel = plan(op, static_cast<char*>(workspace)).kernel;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const dim3 grid = grid_of(op.batch * op.num_heads * kernel.num_splits);
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
#ifndef LIVEVLM_EMULATED
      if (uses_wgmma(op) && op.head_dim == 128) return launch_wgmma<T, 128>(kernel, grid, cuda_stream);
      if (uses_wgmma(op)) return launch_wgmma<T, 64>(kernel, grid, cuda_stream);
#endif
      if (uses_mma(op) && op.head_dim == 128) return launch_mma<T, 128>(kernel, grid, cuda_stream);
      if (uses_mma(op)) return launch_mma<T, 64>(kernel, grid, cuda_stream);
    }
    launch_fma<T>(kernel, grid, cuda_stream);
  });
  if (op.per_head) return;
  launch_kernel(average_scores_kernel<kAverageThreads>,
                grid_of(ceil_div(op.batch / op.num_shared * op.seq_len, kAverageThreads)), kAverageThreads, 0,
                cuda_stream, kernel, "score_tokens: means");
}

}  // namespace livevlm
