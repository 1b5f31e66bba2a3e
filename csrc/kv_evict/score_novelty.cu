// SPDX-License-Identifier: Apache-2.0
#include "kv_evict/score_novelty.cuh"

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
    if (op.head_dim <= 8 * kSize) return body(type, IntTag<kSize>{}, IntTag<8>{});
    return body(type, IntTag<kSize>{}, IntTag<16>{});
  });
}

}  // namespace

void score_novelty_cuda(const ScoreNovelty& op, void* stream) {
  dispatch(op, [&](auto type, auto size, auto lanes) {
    using T = typename decltype(type)::type;
    constexpr int kSize = decltype(size)::value, kLanes = decltype(lanes)::value;
    launch_kernel(score_novelty_kernel<T, kSize, kLanes>,
                  grid_of(op.batch * ceil_div(op.seq_len, kNoveltyTile<kLanes>)), kNoveltyThreads, 0,
                  static_cast<cudaStream_t>(stream), op, "score_novelty");
  });
}

}  // namespace livevlm
