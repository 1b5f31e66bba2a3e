// SPDX-License-Identifier: Apache-2.0
#include "common/cuda_launch.cuh"
#include "kv_evict/score_redundancy.cuh"

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

}  // namespace

int64_t score_redundancy_workspace(const ScoreRedundancy& op) {
  return op.batch * op.tokens_per_frame * op.num_heads * op.head_dim * static_cast<int64_t>(sizeof(float));
}

void score_redundancy_cuda(const ScoreRedundancy& op, void* workspace, void* stream) {
  const RedundancyKernel kernel{op, static_cast<float*>(workspace), 1.0f / static_cast<float>(op.num_frames)};
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch(op, [&](auto type, auto size, auto lanes) {
    using T = typename decltype(type)::type;
    constexpr int kSize = decltype(size)::value, kLanes = decltype(lanes)::value;
    const int64_t patches = op.batch * patch_tiles<kLanes>(op);
    launch_kernel(make_patches_kernel<T, kSize, kLanes>, grid_of(patches), kRedundancyThreads, 0, cuda_stream,
                  kernel, "score_redundancy: patches");
    const int64_t tiles = op.batch * ceil_div(op.seq_len, kTokensPerTile<kLanes>);
    launch_kernel(score_redundancy_kernel<T, kSize, kLanes>, grid_of(tiles), kRedundancyThreads, 0,
                  cuda_stream, kernel, "score_redundancy");
  });
}

}  // namespace livevlm
