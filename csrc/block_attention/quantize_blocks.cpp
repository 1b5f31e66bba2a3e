// SPDX-License-Identifier: Apache-2.0
// Torch side of `quantize_blocks`: unpacks the tensors and calls the kernel of their device.
#include "block_attention/quantize_blocks.h"

#include <torch/csrc/stable/ops.h>

#include "common/stream.h"
#include "common/tensors.h"
#include "ops.h"

namespace livevlm::ops {
namespace {

QuantizeBlocks::Side side_of(const Tensor& source, const Tensor& codes, const Tensor& scale) {
  const auto [batch, block, token, head, dim] = strides_of<5>(source);
  return {source.data_ptr(), batch, block, token, head, dim, static_cast<uint8_t*>(codes.data_ptr()),
          scale.data_ptr()};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_blocks(const Tensor& k, const Tensor& v,
                                                           const std::optional<Tensor>& positions,
                                                           bool int4) {
  const auto [batch, num_blocks, block_size, num_heads, head_dim] = sizes_of<5>(k, "k");
  check_same_device(v, "v", k);
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type(), "v has another dtype than k");
  STD_TORCH_CHECK(sizes_of<5>(v, "v") == sizes_of<5>(k, "k"), "v has another shape than k");
  STD_TORCH_CHECK(!int4 || head_dim % 2 == 0, "int4 needs an even head_dim");
  STD_TORCH_CHECK(k.numel() > 0, "k must not be empty");
  STD_TORCH_CHECK(block_size * head_dim < int64_t{1} << 30, "a block has 2^30 elements of a head or more");

  const int64_t bytes = int4 ? head_dim / 2 : head_dim;
  const auto codes = [&] {
    return torch::stable::new_empty(k, {batch, num_blocks, block_size, num_heads, bytes}, ScalarType::Byte);
  };
  Tensor k_codes = codes(), v_codes = codes();
  const auto scale = [&] {
    return torch::stable::new_empty(k, {batch, num_blocks, num_heads}, ScalarType::Float);
  };
  Tensor k_scale =
      int4 ? torch::stable::new_empty(k, {batch, num_blocks, num_heads, 2, head_dim}, ScalarType::Half)
           : scale();
  Tensor v_scale =
      int4 ? torch::stable::new_empty(k, {batch, num_blocks, block_size, num_heads, 2}, ScalarType::Half)
           : scale();

  QuantizeBlocks params{
      .k = side_of(k, k_codes, k_scale),
      .v = side_of(v, v_codes, v_scale),
      .dtype = float_dtype(k, "k"),
      .batch = batch,
      .num_blocks = num_blocks,
      .block_size = block_size,
      .num_heads = num_heads,
      .head_dim = head_dim,
      .positions = nullptr,
      .positions_int64 = false,
      .positions_batch = 0,
      .int4 = int4,
  };
  if (positions) {
    STD_TORCH_CHECK(positions->dim() == 3 && (positions->size(0) == batch || positions->size(0) == 1),
                    "positions must be [batch or 1, num_blocks, block_size]");
    params.positions_int64 = positions->scalar_type() == ScalarType::Long;
    params.positions_batch = positions->size(0) > 1 ? num_blocks * block_size : 0;
    params.positions = contiguous_data<void>(*positions, "positions",
                                             params.positions_int64 ? ScalarType::Long : ScalarType::Int,
                                             positions->size(0) * num_blocks * block_size, k);
  }
#ifdef LIVEVLM_WITH_CUDA
  if (use_cuda(k)) {
    const DeviceGuard guard(k.get_device_index());
    quantize_blocks_cuda(params, current_cuda_stream(k.get_device_index()));
    return {k_codes, v_codes, k_scale, v_scale};
  }
#endif
  LIVEVLM_CPU_CALL(quantize_blocks_cpu, params);
  return {k_codes, v_codes, k_scale, v_scale};
}

}  // namespace livevlm::ops
