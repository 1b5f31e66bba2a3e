// SPDX-License-Identifier: Apache-2.0
// Torch side of `score_novelty`: unpacks the tensors and calls the kernel of their device.
#include "kv_evict/score_novelty.h"

#include <torch/csrc/stable/ops.h>

#include "common/stream.h"
#include "common/token_tensors.h"
#include "ops.h"

namespace livevlm::ops {

std::tuple<Tensor, Tensor> score_novelty(const Tensor& x, const Tensor& usual, const Tensor& slots,
                                         const Tensor& previous, const std::optional<Tensor>& seq_lens) {
  const auto [batch, seq_len, num_heads, head_dim] = sizes_of<4>(x, "x");
  const auto [usual_batch, tokens_per_frame, usual_heads, usual_dim] = sizes_of<4>(usual, "usual");
  check_same_device(usual, "usual", x);
  STD_TORCH_CHECK(usual.scalar_type() == ScalarType::Float, "usual must be float32");
  STD_TORCH_CHECK(usual_batch == batch && usual_heads == num_heads && usual_dim == head_dim,
                  "usual does not have the batch, heads and head_dim of x");
  STD_TORCH_CHECK(tokens_per_frame >= 1, "usual is empty");
  STD_TORCH_CHECK(seq_len <= INT32_MAX, "x has more tokens than previous can name");
  Tensor change = torch::stable::new_empty(x, {batch, seq_len}, ScalarType::Float);
  Tensor step = torch::stable::new_empty(x, {batch, seq_len}, ScalarType::Float);
  const ScoreNovelty params{
      .x = tokens_of(x),
      .usual = tokens_of(usual),
      .slots = contiguous_data<const int32_t>(slots, "slots", ScalarType::Int, batch * seq_len, x),
      .previous = contiguous_data<const int32_t>(previous, "previous", ScalarType::Int, batch * seq_len, x),
      .seq_lens = optional_int32(seq_lens, "seq_lens", batch, x),
      .dtype = float_dtype(x, "x"),
      .batch = batch,
      .seq_len = seq_len,
      .num_heads = num_heads,
      .head_dim = head_dim,
      .tokens_per_frame = tokens_per_frame,
      .change = static_cast<float*>(change.data_ptr()),
      .step = static_cast<float*>(step.data_ptr()),
  };
  if (batch * seq_len == 0) return {change, step};
#ifdef LIVEVLM_WITH_CUDA
  if (use_cuda(x)) {
    const DeviceGuard guard(x.get_device_index());
    score_novelty_cuda(params, current_cuda_stream(x.get_device_index()));
    return {change, step};
  }
#endif
  LIVEVLM_CPU_CALL(score_novelty_cpu, params);
  return {change, step};
}

}  // namespace livevlm::ops
