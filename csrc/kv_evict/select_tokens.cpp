// SPDX-License-Identifier: Apache-2.0
// Torch side of `select_tokens`: unpacks the tensors and calls the kernel of their device.
#include "kv_evict/select_tokens.h"

#include "common/launch.h"
#include "ops.h"

namespace livevlm::ops {

std::tuple<Tensor, Tensor> select_tokens(const Tensor& scores, const std::optional<Tensor>& seq_lens,
                                         const std::optional<Tensor>& buckets, int64_t budget,
                                         int64_t num_top, int64_t num_buckets, int64_t bucket_capacity) {
  const auto [batch, seq_len] = sizes_of<2>(scores, "scores");
  const auto [stride_batch, stride_token] = strides_of<2>(scores);
  STD_TORCH_CHECK(1 <= budget && budget <= seq_len, "budget=", budget, " must lie between 1 and ", seq_len);
  STD_TORCH_CHECK(seq_len < (int64_t{1} << 31), "seq_len=", seq_len, " must be below 2^31");
  STD_TORCH_CHECK(num_top >= 0 && num_buckets >= 1 && bucket_capacity >= 1,
                  "num_top must not be negative, num_buckets and bucket_capacity must be positive");
  Tensor indices = torch::stable::new_empty(scores, {batch, budget}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(scores, {batch}, ScalarType::Int);
  const SelectTokens params{
      .scores = scores.data_ptr(),
      .dtype = float_dtype(scores, "scores"),
      .batch = batch,
      .seq_len = seq_len,
      .stride_batch = stride_batch,
      .stride_token = stride_token,
      .seq_lens = optional_int32(seq_lens, "seq_lens", batch, scores),
      .buckets = optional_int32(buckets, "buckets", batch * seq_len, scores),
      .budget = budget,
      .num_top = num_top,
      .num_buckets = num_buckets,
      .bucket_capacity = bucket_capacity,
      .indices = static_cast<int32_t*>(indices.data_ptr()),
      .counts = static_cast<int32_t*>(counts.data_ptr()),
  };
  if (batch > 0) LIVEVLM_RUN(select_tokens, params, scores);
  return {indices, counts};
}

}  // namespace livevlm::ops
