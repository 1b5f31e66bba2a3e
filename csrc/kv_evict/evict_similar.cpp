// SPDX-License-Identifier: Apache-2.0
// Torch side of `evict_similar`: unpacks the tensors and calls the kernel of their device.
#include "kv_evict/evict_similar.h"

#include "common/launch.h"
#include "common/token_tensors.h"
#include "ops.h"

namespace livevlm::ops {

std::tuple<Tensor, Tensor> evict_similar(const Tensor& k, const Tensor& v, const Tensor& slots,
                                         std::vector<Tensor> tensors, int64_t budget,
                                         int64_t num_recent_frames, int64_t tokens_per_frame,
                                         int64_t num_dissimilar, bool per_head, int64_t num_shared) {
  const auto [batch, seq_len, num_heads, head_dim] = sizes_of<4>(k, "k");
  const int64_t recent = num_recent_frames * tokens_per_frame;
  STD_TORCH_CHECK(num_recent_frames >= 1 && tokens_per_frame >= 1 && recent <= budget && budget <= seq_len,
                  "budget=", budget, " must lie between ", recent, " recent tokens and seq_len=", seq_len);
  STD_TORCH_CHECK(0 <= num_dissimilar && num_dissimilar <= budget - recent, "num_dissimilar=", num_dissimilar,
                  " must lie between 0 and ", budget - recent);
  STD_TORCH_CHECK(seq_len < (int64_t{1} << 31), "seq_len=", seq_len, " must be below 2^31");
  STD_TORCH_CHECK(num_shared >= 1 && batch % num_shared == 0 && (num_shared == 1 || !per_head),
                  "num_shared=", num_shared, " must divide the batch and excludes per_head");
  auto outputs = [&](bool counts) {
    if (per_head) {
      return counts ? torch::stable::new_empty(k, {batch, num_heads}, ScalarType::Int)
                    : torch::stable::new_empty(k, {batch, num_heads, budget}, ScalarType::Int);
    }
    return counts ? torch::stable::new_empty(k, {batch}, ScalarType::Int)
                  : torch::stable::new_empty(k, {batch, budget}, ScalarType::Int);
  };
  Tensor indices = outputs(false), counts = outputs(true);
  const int64_t past = seq_len - recent;
  Tokens recent_k = tokens_of(k);
  recent_k.data = static_cast<char*>(recent_k.data) +
                  past * recent_k.stride_token * static_cast<int64_t>(k.element_size());
  auto* const kept = static_cast<int32_t*>(indices.data_ptr());
  EvictSimilar params{
      .scoring = {.k = tokens_of(k),
                  .v = tokens_like(v, "v", k),
                  .recent_k = recent_k,
                  .stride_frame = tokens_per_frame * recent_k.stride_token,
                  .slots =
                      contiguous_data<const int32_t>(slots, "slots", ScalarType::Int, batch * seq_len, k),
                  .seq_lens = nullptr,
                  .dtype = float_dtype(k, "k"),
                  .batch = batch,
                  .seq_len = seq_len,
                  .num_heads = num_heads,
                  .head_dim = head_dim,
                  .num_frames = num_recent_frames,
                  .tokens_per_frame = tokens_per_frame,
                  .per_head = per_head,
                  .similarity = nullptr,
                  .value_norm = nullptr},
      .moving = {.tensors = {rows_of(k, "k", per_head), rows_of(v, "v", per_head)},
                 .num_tensors = 2,
                 .indices = kept,
                 .batch = batch,
                 .num_heads = per_head ? num_heads : 1,
                 .seq_len = seq_len,
                 .num_kept = budget},
      .num_past = past,
      .num_dissimilar = num_dissimilar,
      .num_shared = num_shared,
      .indices = kept,
      .counts = static_cast<int32_t*>(counts.data_ptr()),
  };
  STD_TORCH_CHECK(tensors.size() + 2 <= kMaxCompactTensors, "tensors has more than ", kMaxCompactTensors - 2,
                  " entries");
  for (const Tensor& tensor : tensors) {
    check_same_device(tensor, "tensors", k);
    STD_TORCH_CHECK(tensor.dim() >= (per_head ? 3 : 2) && tensor.size(0) == batch &&
                        tensor.size(1) == seq_len && (!per_head || tensor.size(2) == num_heads),
                    "tensors does not have the batch, seq_len and heads of k");
    params.moving.tensors[params.moving.num_tensors++] = rows_of(tensor, "tensors", per_head);
  }
  if (batch > 0) LIVEVLM_RUN(evict_similar, params, k);
  return {indices, counts};
}

}  // namespace livevlm::ops
