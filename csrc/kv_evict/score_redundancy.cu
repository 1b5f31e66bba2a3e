// SPDX-License-Identifier: Apache-2.0
#include "common/cuda_launch.cuh"
#include "kv_evict/score_redundancy.cuh"

#include <algorithm>

namespace livevlm {
namespace {

// Calls body(TypeTag<T>{}, IntTag<elements of a load>{}, IntTag<lanes>{}).
template <typename Body>
void dispatch(const ScoreRedundancy& op, Body body) {
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kSize = kVectorSize<T>;
    const bool wide = vectorised(op.k, op.head_dim, sizeof(T)) && vectorised(op.v, op.head_dim, sizeof(T)) &&
                      vectorised(op.recent_k, op.head_dim, sizeof(T)) &&
                      op.stride_frame * int64_t{sizeof(T)} % 16 == 0;
    if (!wide) return body(type, IntTag<1>{}, IntTag<32>{});
    if (op.head_dim <= 8 * kSize) return body(type, IntTag<kSize>{}, IntTag<8>{});
    if (op.head_dim <= 16 * kSize) return body(type, IntTag<kSize>{}, IntTag<16>{});
    return body(type, IntTag<kSize>{}, IntTag<32>{});
  });
}

// How far apart a group's tokens are: a frame, or several of few tokens.
uint32_t pitch_of(const ScoreRedundancy& op) {
  constexpr int64_t kLeast = 128;  // so that whole tiles fill most of it
  const int64_t frames = ceil_div(kLeast, op.tokens_per_frame) * op.tokens_per_frame;
  return static_cast<uint32_t>(std::min(frames, op.seq_len));
}

// Whether patches must be made: a single frame's keys are used as they are.
bool makes_patches(const ScoreRedundancy& op) {
  return op.num_frames > 1;
}

Tokens patches_of(const ScoreRedundancy& op, void* workspace) {
  if (!makes_patches(op)) return op.recent_k;
  const int64_t slot = op.num_heads * op.head_dim;
  return {workspace, op.tokens_per_frame * slot, slot, op.head_dim, 1};
}

}  // namespace

int64_t score_redundancy_workspace(const ScoreRedundancy& op) {
  if (!makes_patches(op)) return 0;
  return op.batch * op.tokens_per_frame * op.num_heads * op.head_dim * static_cast<int64_t>(sizeof(float));
}

void score_redundancy_cuda(const ScoreRedundancy& op, void* workspace, void* stream) {
  const RedundancyKernel kernel{op, patches_of(op, workspace), 1.0f / static_cast<float>(op.num_frames),
                                pitch_of(op)};
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch(op, [&](auto type, auto size, auto lanes) {
    using T = typename decltype(type)::type;
    constexpr int kSize = decltype(size)::value, kLanes = decltype(lanes)::value;
    const dim3 grid = grid_of(op.batch * Tiles<kLanes>(op.seq_len, kernel.pitch).count);
    if (!makes_patches(op)) {
      launch_kernel(score_redundancy_kernel<T, kSize, kLanes, true>, grid, kRedundancyThreads, 0, cuda_stream,
                    kernel, "score_redundancy");
      return;
    }
    launch_kernel(make_patches_kernel<T, kSize, kLanes>, grid_of(op.batch * patch_tiles<kLanes>(op)),
                  kRedundancyThreads, 0, cuda_stream, kernel, "score_redundancy: patches");
    launch_overlapping(score_redundancy_kernel<T, kSize, kLanes, false>, grid, kRedundancyThreads, 0,
                       cuda_stream, kernel, "score_redundancy");
  });
}

}  // namespace livevlm
