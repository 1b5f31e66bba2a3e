// SPDX-License-Identifier: Apache-2.0
// Torch side of `retrieve_blocks`: unpacks the tensors and calls the kernel of their device.
#include "block_attention/retrieve_blocks.h"

#include "common/launch.h"
#include "common/token_tensors.h"
#include "ops.h"

namespace livevlm::ops {

std::tuple<Tensor, Tensor> retrieve_blocks(const Tensor& q, const Tensor& keys,
                                           const std::optional<Tensor>& seq_lens, int64_t kind, bool softmax,
                                           int64_t num_selected, std::optional<double> ratio,
                                           int64_t block_size, int64_t num_sink_blocks,
                                           int64_t num_recent_blocks, bool per_head, double sm_scale) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "kind must be 0, 1 or 2");
  const auto score = static_cast<BlockScore>(kind);
  const bool bounds = score == BlockScore::kMinMax;
  STD_TORCH_CHECK(keys.dim() == (bounds ? 5 : 4), "keys has the wrong number of dimensions");
  STD_TORCH_CHECK(!bounds || keys.size(2) == 2, "keys must hold a lower and an upper bound a block");
  // For bounds a view of the lower ones; the upper ones are `upper` elements further.
  const Tensor entries = bounds ? torch::stable::select(keys, 2, 0) : keys;
  const auto [batch, num_entries, num_heads, head_dim] = sizes_of<4>(entries, "keys");
  const auto [q_batch, num_queries, num_qo_heads, q_dim] = sizes_of<4>(q, "q");
  check_same_device(q, "q", keys);
  STD_TORCH_CHECK(batch * num_entries * num_queries * head_dim > 0, "q and keys must not be empty");
  STD_TORCH_CHECK(q_batch == batch && q_dim == head_dim && num_heads > 0 && num_qo_heads % num_heads == 0,
                  "q does not have the batch, head_dim and a multiple of the heads of keys");
  STD_TORCH_CHECK(num_selected >= 1 && block_size >= 1 && num_sink_blocks >= 0 && num_recent_blocks >= 0 &&
                      num_sink_blocks + num_recent_blocks <= num_selected,
                  "num_selected, block_size, num_sink_blocks or num_recent_blocks is out of range");
  STD_TORCH_CHECK(!ratio || (*ratio > 0 && *ratio <= 1), "ratio must be above 0 and at most 1");
  STD_TORCH_CHECK(score != BlockScore::kMass || (softmax && q.scalar_type() == keys.scalar_type()),
                  "the attention mass needs a softmax, and q in the dtype of keys");
  Tensor block_table = per_head
                           ? torch::stable::new_empty(keys, {batch, num_heads, num_selected}, ScalarType::Int)
                           : torch::stable::new_empty(keys, {batch, num_selected}, ScalarType::Int);
  Tensor counts = per_head ? torch::stable::new_empty(keys, {batch, num_heads}, ScalarType::Int)
                           : torch::stable::new_empty(keys, {batch}, ScalarType::Int);
  const RetrieveBlocks params{
      .q = tokens_of(q),
      .keys = tokens_of(entries),
      .upper = bounds ? keys.stride(2) : 0,
      .q_dtype = float_dtype(q, "q"),
      .keys_dtype = float_dtype(keys, "keys"),
      .kind = score,
      .softmax = softmax,
      .batch = batch,
      .num_queries = num_queries,
      .num_entries = num_entries,
      .num_heads = num_heads,
      .group_size = num_qo_heads / num_heads,
      .head_dim = head_dim,
      .seq_lens = optional_int32(seq_lens, "seq_lens", batch, keys),
      .num_selected = num_selected,
      .block_size = block_size,
      .num_sink_blocks = num_sink_blocks,
      .num_recent_blocks = num_recent_blocks,
      .ratio = ratio.value_or(2.0),
      .per_head = per_head,
      .sm_scale = static_cast<float>(sm_scale),
      .block_table = static_cast<int32_t*>(block_table.data_ptr()),
      .counts = static_cast<int32_t*>(counts.data_ptr()),
  };
  LIVEVLM_RUN(retrieve_blocks, params, keys);
  return {block_table, counts};
}

}  // namespace livevlm::ops
