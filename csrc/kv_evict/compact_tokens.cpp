// SPDX-License-Identifier: Apache-2.0
// Torch side of `compact_tokens`: unpacks the tensors and calls the kernel of their device.
#include "kv_evict/compact_tokens.h"

#include <string>

#include "common/launch.h"
#include "common/token_tensors.h"
#include "ops.h"

namespace livevlm::ops {

void compact_tokens(std::vector<Tensor> tensors, const Tensor& indices, bool per_head) {
  STD_TORCH_CHECK(!tensors.empty(), "tensors is empty");
  STD_TORCH_CHECK(indices.dim() == (per_head ? 3 : 2), "indices must have ", per_head ? 3 : 2, " dimensions");
  const int64_t batch = indices.size(0), num_heads = per_head ? indices.size(1) : 1;
  const int64_t num_kept = indices.size(per_head ? 2 : 1), seq_len = tensors[0].size(1);
  STD_TORCH_CHECK(num_kept <= seq_len, "indices names ", num_kept, " tokens of ", seq_len);
  STD_TORCH_CHECK(num_kept < (int64_t{1} << 31), "indices has 2^31 columns or more");
  CompactTokens params{
      .tensors = {},
      .num_tensors = 0,
      .indices = contiguous_data<const int32_t>(indices, "indices", ScalarType::Int,
                                                batch * num_heads * num_kept, tensors[0]),
      .batch = batch,
      .num_heads = num_heads,
      .seq_len = seq_len,
      .num_kept = num_kept,
  };
  std::vector<Rows> rows;  // all checked before the first is moved
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string name = "tensors[" + std::to_string(i) + "]";
    const Tensor& tensor = tensors[i];
    check_same_device(tensor, name.c_str(), tensors[0]);
    STD_TORCH_CHECK(tensor.dim() >= (per_head ? 3 : 2) && tensor.size(0) == batch &&
                        tensor.size(1) == seq_len && (!per_head || tensor.size(2) == num_heads),
                    name, " does not have the batch, seq_len and heads of the others");
    rows.push_back(rows_of(tensor, name.c_str(), per_head));
  }
  if (batch * num_heads * num_kept == 0) return;
  for (size_t i = 0; i < rows.size(); ++i) {
    params.tensors[params.num_tensors++] = rows[i];
    if (params.num_tensors == kMaxCompactTensors || i + 1 == rows.size()) {
      LIVEVLM_RUN(compact_tokens, params, tensors[0]);
      params.num_tensors = 0;
    }
  }
}

}  // namespace livevlm::ops
