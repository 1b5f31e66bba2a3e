// SPDX-License-Identifier: Apache-2.0
// Torch side of `merge_tokens`: unpacks the tensors and calls the kernel of their device.
#include "kv_merge/merge_tokens.h"

#include "common/launch.h"
#include "common/token_tensors.h"
#include "ops.h"

namespace livevlm::ops {

std::tuple<Tensor, Tensor, Tensor> merge_tokens(const Tensor& k, const Tensor& v,
                                                const std::optional<Tensor>& groups,
                                                const std::optional<Tensor>& indices,
                                                const std::optional<Tensor>& sizes,
                                                const std::optional<Tensor>& weights,
                                                const std::optional<Tensor>& seq_lens, int64_t num_groups) {
  const auto [batch, seq_len, num_heads, head_dim] = sizes_of<4>(k, "k");
  STD_TORCH_CHECK(groups.has_value() != indices.has_value(),
                  "exactly one of groups and indices must be given");
  STD_TORCH_CHECK(num_groups >= 1 && num_groups < (int64_t{1} << 31) && seq_len < (int64_t{1} << 31),
                  "num_groups=", num_groups, " and seq_len=", seq_len, " must be positive and below 2^31");
  Tensor k_out = torch::stable::new_empty(k, {batch, num_groups, num_heads, head_dim}, k.scalar_type());
  Tensor v_out = torch::stable::new_empty(k, {batch, num_groups, num_heads, head_dim}, k.scalar_type());
  Tensor sizes_out = torch::stable::new_empty(k, {batch, num_groups}, ScalarType::Float);
  const auto optional_float = [&](const std::optional<Tensor>& tensor, const char* name) {
    return tensor ? contiguous_data<const float>(*tensor, name, ScalarType::Float, batch * seq_len, k)
                  : nullptr;
  };
  const MergeTokens params{
      .k = tokens_of(k),
      .v = tokens_like(v, "v", k),
      .dtype = float_dtype(k, "k"),
      .batch = batch,
      .seq_len = seq_len,
      .num_heads = num_heads,
      .head_dim = head_dim,
      .num_groups = num_groups,
      .groups = optional_int32(groups, "groups", batch * seq_len, k),
      .indices = optional_int32(indices, "indices", batch * num_groups, k),
      .sizes = optional_float(sizes, "sizes"),
      .weights = optional_float(weights, "weights"),
      .seq_lens = optional_int32(seq_lens, "seq_lens", batch, k),
      .k_out = k_out.data_ptr(),
      .v_out = v_out.data_ptr(),
      .sizes_out = static_cast<float*>(sizes_out.data_ptr()),
  };
  if (batch > 0) LIVEVLM_RUN(merge_tokens, params, k);
  return {k_out, v_out, sizes_out};
}

}  // namespace livevlm::ops
