// SPDX-License-Identifier: Apache-2.0
// Torch side of `score_tokens`: unpacks the tensors and calls the kernel of their device.
#include "kv_evict/score_tokens.h"

#include "common/launch.h"
#include "common/token_tensors.h"
#include "ops.h"

namespace livevlm::ops {

Tensor score_tokens(const Tensor& q, const Tensor& k, const std::optional<Tensor>& seq_lens,
                    const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin_cache,
                    double sm_scale, bool causal, bool per_head, int64_t num_shared) {
  const auto [batch, seq_len, num_heads, head_dim] = sizes_of<4>(k, "k");
  const auto [q_batch, num_queries, num_qo_heads, q_dim] = sizes_of<4>(q, "q");
  check_same_device(q, "q", k);
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type(), "q has another dtype than k");
  STD_TORCH_CHECK(q_batch == batch && q_dim == head_dim && num_heads > 0 && num_qo_heads % num_heads == 0,
                  "q does not have the batch, head_dim and a multiple of the heads of k");
  STD_TORCH_CHECK(num_shared >= 1 && batch % num_shared == 0, "num_shared=", num_shared,
                  " must divide the batch");
  STD_TORCH_CHECK(positions.has_value() == cos_sin_cache.has_value(),
                  "RoPE needs positions and cos_sin_cache");
  const bool int64 = positions && positions->scalar_type() == ScalarType::Long;
  const int64_t max_position = cos_sin_cache ? sizes_of<2>(*cos_sin_cache, "cos_sin_cache")[0] : 0;
  Tensor cache = cos_sin_cache ? torch::stable::contiguous(*cos_sin_cache) : k;
  STD_TORCH_CHECK(!cos_sin_cache || (head_dim % 2 == 0 && max_position > 0), "RoPE needs an even head_dim");
  Tensor out = per_head ? torch::stable::new_empty(k, {batch, num_heads, seq_len}, ScalarType::Float)
                        : torch::stable::new_empty(k, {batch / num_shared, seq_len}, ScalarType::Float);
  const ScoreTokens params{
      .q = tokens_of(q),
      .k = tokens_of(k),
      .dtype = float_dtype(k, "k"),
      .batch = batch,
      .num_queries = num_queries,
      .seq_len = seq_len,
      .num_heads = num_heads,
      .group_size = num_qo_heads / num_heads,
      .head_dim = head_dim,
      .seq_lens = optional_int32(seq_lens, "seq_lens", batch, k),
      .positions = positions
                       ? contiguous_data<void>(*positions, "positions",
                                               int64 ? ScalarType::Long : ScalarType::Int, batch * seq_len, k)
                       : nullptr,
      .positions_int64 = int64,
      .cos_sin_cache = cos_sin_cache ? contiguous_data<const float>(cache, "cos_sin_cache", ScalarType::Float,
                                                                    max_position * head_dim, k)
                                     : nullptr,
      .max_position = max_position,
      .sm_scale = static_cast<float>(sm_scale),
      .causal = causal,
      .per_head = per_head,
      .num_shared = num_shared,
      .out = static_cast<float*>(out.data_ptr()),
  };
  if (batch * seq_len > 0) LIVEVLM_RUN(score_tokens, params, k);
  return out;
}

}  // namespace livevlm::ops
