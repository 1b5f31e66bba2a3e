// SPDX-License-Identifier: Apache-2.0
#include "block_attention/merge_states.cuh"

#include "common/cuda_launch.cuh"

namespace livevlm {
namespace {

template <typename T, int kSize>
void launch(const MergeStates& op, void* stream) {
  const int64_t vectors = op.total_q * op.num_heads * (op.head_dim / kSize);
  launch_kernel(merge_states_kernel<T, kSize>, grid_of(ceil_div(vectors, kMergeThreads)), kMergeThreads, 0,
                static_cast<cudaStream_t>(stream), op, "merge_states");
}

}  // namespace

int64_t merge_states_workspace(const MergeStates&) {
  return 0;
}

void merge_states_cuda(const MergeStates& op, void*, void* stream) {
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool vectors = vectorised(op.outs, op.head_dim, sizeof(T)) && aligned16(op.out);
    vectors ? launch<T, kVectorSize<T>>(op, stream) : launch<T, 1>(op, stream);
  });
}

}  // namespace livevlm
