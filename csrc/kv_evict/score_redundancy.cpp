// SPDX-License-Identifier: Apache-2.0
// Torch side of `score_redundancy`: unpacks the tensors and calls the kernel of their device.
#include "kv_evict/score_redundancy.h"

#include "common/launch.h"
#include "common/token_tensors.h"
#include "ops.h"

namespace livevlm::ops {

std::tuple<Tensor, Tensor> score_redundancy(const Tensor& k, const Tensor& v, const Tensor& recent_k,
                                            const Tensor& slots, const std::optional<Tensor>& seq_lens,
                                            bool per_head) {
  const auto [batch, seq_len, num_heads, head_dim] = sizes_of<4>(k, "k");
  const auto [recent_batch, num_frames, tokens_per_frame, recent_heads, recent_dim] =
      sizes_of<5>(recent_k, "recent_k");
  const auto recent = strides_of<5>(recent_k);
  check_same_device(recent_k, "recent_k", k);
  STD_TORCH_CHECK(recent_k.scalar_type() == k.scalar_type(), "recent_k has another dtype than k");
  STD_TORCH_CHECK(recent_batch == batch && recent_heads == num_heads && recent_dim == head_dim,
                  "recent_k does not have the batch, heads and head_dim of k");
  STD_TORCH_CHECK(num_frames >= 1 && tokens_per_frame >= 1, "recent_k is empty");
  const int64_t rows = per_head ? num_heads : 1;
  auto scores = [&] {
    return per_head ? torch::stable::new_empty(k, {batch, num_heads, seq_len}, ScalarType::Float)
                    : torch::stable::new_empty(k, {batch, seq_len}, ScalarType::Float);
  };
  Tensor similarity = scores(), value_norm = scores();
  const ScoreRedundancy params{
      .k = tokens_of(k),
      .v = tokens_like(v, "v", k),
      .recent_k = {recent_k.data_ptr(), recent[0], recent[2], recent[3], recent[4]},
      .stride_frame = recent[1],
      .slots = contiguous_data<const int32_t>(slots, "slots", ScalarType::Int, batch * seq_len, k),
      .seq_lens = optional_int32(seq_lens, "seq_lens", batch, k),
      .dtype = float_dtype(k, "k"),
      .batch = batch,
      .seq_len = seq_len,
      .num_heads = num_heads,
      .head_dim = head_dim,
      .num_frames = num_frames,
      .tokens_per_frame = tokens_per_frame,
      .per_head = per_head,
      .similarity = static_cast<float*>(similarity.data_ptr()),
      .value_norm = static_cast<float*>(value_norm.data_ptr()),
  };
  if (batch * seq_len * rows > 0) LIVEVLM_RUN(score_redundancy, params, k);
  return {similarity, value_norm};
}

}  // namespace livevlm::ops
