// SPDX-License-Identifier: Apache-2.0
#include "block_attention/summarize_blocks.cuh"

#include <algorithm>

#include "common/cuda_launch.cuh"

namespace livevlm {
namespace {

template <typename T, int kSize, bool kMinMax>
void launch(const SummarizeBlocks& p, cudaStream_t stream) {
  const int64_t vectors = p.num_heads * p.head_dim / kSize;
  const int64_t width = std::min<int64_t>(vectors, kSummarizeThreads);
  const int64_t height = std::min<int64_t>(p.num_blocks, std::max<int64_t>(1, kSummarizeThreads / width));
  const dim3 threads(static_cast<unsigned>(width), static_cast<unsigned>(height));
  const dim3 grid(static_cast<unsigned>(ceil_div(p.num_blocks, height)),
                  static_cast<unsigned>(std::min(p.batch, kMaxGridYZ)),
                  static_cast<unsigned>(std::min(ceil_div(vectors, width), kMaxGridYZ)));
  launch_kernel(summarize_blocks_kernel<T, kSize, kMinMax>, grid, threads, 0, stream, p, "summarize_blocks");
}

}  // namespace

void summarize_blocks_cuda(const SummarizeBlocks& p, void* stream) {
  dispatch_float(p.dtype, [&](auto type) {
    dispatch_bool(p.minmax, [&](auto minmax) {
      using T = typename decltype(type)::type;
      constexpr bool kMinMax = decltype(minmax)::value;
      constexpr int kSize = kVectorSize<T>;
      const bool vectorised = p.stride_dim == 1 && p.head_dim % kSize == 0 && aligned16(p.out) &&
                              rows_aligned16(p.k, sizeof(T), {p.stride_batch, p.stride_token, p.stride_head});
      const auto cuda_stream = static_cast<cudaStream_t>(stream);
      vectorised ? launch<T, kSize, kMinMax>(p, cuda_stream) : launch<T, 1, kMinMax>(p, cuda_stream);
    });
  });
}

}  // namespace livevlm
