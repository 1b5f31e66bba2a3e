// SPDX-License-Identifier: Apache-2.0
#include "block_attention/quantize_blocks.cuh"

#include "common/cuda_launch.cuh"

namespace livevlm {
namespace {

bool readable(const QuantizeBlocks::Side& side, int64_t element_size) {
  return side.stride_dim == 1 &&
         rows_aligned16(side.data, element_size,
                        {side.stride_batch, side.stride_block, side.stride_token, side.stride_head});
}

template <typename T, int kSize, bool kInt4>
void launch(const QuantizeBlocks& p, cudaStream_t stream) {
  const int64_t blocks = 2 * p.batch * p.num_blocks * p.num_heads;
  launch_kernel(quantize_blocks_kernel<T, kSize, kInt4>, grid_of(blocks), kQuantizeThreads, 0, stream, p,
                "quantize_blocks");
}

}  // namespace

void quantize_blocks_cuda(const QuantizeBlocks& p, void* stream) {
  dispatch_float(p.dtype, [&](auto type) {
    dispatch_bool(p.int4, [&](auto int4) {
      using T = typename decltype(type)::type;
      constexpr bool kInt4 = decltype(int4)::value;
      constexpr int kSize = kVectorSize<T>;
      const bool vectorised =
          readable(p.k, sizeof(T)) && readable(p.v, sizeof(T)) && p.head_dim / (kInt4 ? 2 : 1) % kSize == 0;
      const auto cuda_stream = static_cast<cudaStream_t>(stream);
      vectorised ? launch<T, kSize, kInt4>(p, cuda_stream) : launch<T, 1, kInt4>(p, cuda_stream);
    });
  });
}

}  // namespace livevlm
