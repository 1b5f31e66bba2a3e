// SPDX-License-Identifier: Apache-2.0
// Torch side of `summarize_blocks`: unpacks the tensors and calls the kernel of their device.
#include "block_attention/summarize_blocks.h"

#include "common/stream.h"
#include "common/tensors.h"
#include "ops.h"

namespace livevlm::ops {

void summarize_blocks(const Tensor& k, const std::optional<Tensor>& seq_lens,
                      const std::optional<Tensor>& first_token, int64_t block_size, bool minmax,
                      const Tensor& out) {
  const auto [batch, seq_len, num_heads, head_dim] = sizes_of<4>(k, "k");
  const auto [stride_batch, stride_token, stride_head, stride_dim] = strides_of<4>(k);
  STD_TORCH_CHECK(block_size >= 1, "block_size=", block_size, " must be at least 1");
  const int64_t num_blocks = seq_len / block_size + (seq_len % block_size != 0);
  const int64_t out_numel = batch * num_blocks * (minmax ? 2 : 1) * num_heads * head_dim;

  const SummarizeBlocks params{
      .k = k.data_ptr(),
      .dtype = float_dtype(k, "k"),
      .batch = batch,
      .seq_len = seq_len,
      .num_heads = num_heads,
      .head_dim = head_dim,
      .stride_batch = stride_batch,
      .stride_token = stride_token,
      .stride_head = stride_head,
      .stride_dim = stride_dim,
      .seq_lens = optional_int32(seq_lens, "seq_lens", batch, k),
      .first_token = optional_int32(first_token, "first_token", batch, k),
      .block_size = block_size,
      .num_blocks = num_blocks,
      .minmax = minmax,
      .out = contiguous_data<float>(out, "out", ScalarType::Float, out_numel, k),
  };
  if (out_numel == 0) return;
#ifdef LIVEVLM_WITH_CUDA
  if (use_cuda(k)) {
    const DeviceGuard guard(k.get_device_index());
    return summarize_blocks_cuda(params, current_cuda_stream(k.get_device_index()));
  }
#endif
  LIVEVLM_CPU_CALL(summarize_blocks_cpu, params);
}

}  // namespace livevlm::ops
