// SPDX-License-Identifier: Apache-2.0
// Torch side of `merge_states`: unpacks the tensors and calls the kernel of their device.
#include "block_attention/merge_states.h"

#include "common/launch.h"
#include "common/token_tensors.h"
#include "ops.h"

namespace livevlm::ops {

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses) {
  const auto [num_parts, total_q, num_heads, head_dim] = sizes_of<4>(outs, "outs");
  STD_TORCH_CHECK(num_parts * total_q * num_heads * head_dim > 0, "outs must not be empty");
  check_same_device(lses, "lses", outs);
  STD_TORCH_CHECK(lses.scalar_type() == ScalarType::Float, "lses must be float32");
  STD_TORCH_CHECK((sizes_of<3>(lses, "lses") == std::array<int64_t, 3>{num_parts, total_q, num_heads}),
                  "lses does not have the shape of outs without head_dim");
  Tensor out = torch::stable::new_empty(outs, {total_q, num_heads, head_dim});
  Tensor lse = torch::stable::new_empty(outs, {total_q, num_heads}, ScalarType::Float);
  const auto [stride_part, stride_token, stride_head] = strides_of<3>(lses);
  const MergeStates params{
      .outs = tokens_of(outs),
      .dtype = float_dtype(outs, "outs"),
      .lses = static_cast<const float*>(lses.data_ptr()),
      .lse_stride_part = stride_part,
      .lse_stride_token = stride_token,
      .lse_stride_head = stride_head,
      .num_parts = num_parts,
      .total_q = total_q,
      .num_heads = num_heads,
      .head_dim = head_dim,
      .out = out.data_ptr(),
      .lse = static_cast<float*>(lse.data_ptr()),
  };
  LIVEVLM_RUN(merge_states, params, outs);
  return {out, lse};
}

}  // namespace livevlm::ops
