// SPDX-License-Identifier: Apache-2.0
// Unpacks tensors of tokens into `Tokens` and `Rows`. For torch sides only.
#pragma once

#include <bit>
#include <cstdint>

#include "common/tensors.h"
#include "common/tokens.h"

namespace livevlm {

// `tensor` is [batch, tokens, heads, dim].
inline Tokens tokens_of(const Tensor& tensor) {
  const auto [batch, token, head, dim] = strides_of<4>(tensor);
  return {tensor.data_ptr(), batch, token, head, dim};
}

// A second tensor with the shape, dtype and device of the first.
inline Tokens tokens_like(const Tensor& tensor, const char* name, const Tensor& like) {
  check_same_device(tensor, name, like);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " has another dtype than the keys");
  STD_TORCH_CHECK(sizes_of<4>(tensor, name) == sizes_of<4>(like, "k"), name,
                  " has another shape than the keys");
  return tokens_of(tensor);
}

// `tensor` is [batch, tokens, (heads if per_head,) ...].
inline Rows rows_of(const Tensor& tensor, const char* name, bool per_head) {
  const auto item = static_cast<int64_t>(tensor.element_size());
  const auto stride = [&](int64_t dim) { return tensor.size(dim) > 1 ? tensor.stride(dim) * item : 0; };
  const int64_t first = per_head ? 3 : 2;
  Rows rows{.data = static_cast<char*>(tensor.data_ptr()),
            .stride_batch = stride(0),
            .stride_token = stride(1),
            .stride_head = per_head ? stride(2) : 0,
            .unit = item,
            .num_units = 0,
            .num_dims = 1,
            .sizes = {1},
            .strides = {item}};
  // Merge neighbouring dimensions, from the fastest one outwards; `dims` is in that order.
  int64_t sizes[kMaxRowDims] = {1}, strides[kMaxRowDims] = {item};
  int num_dims = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= first; --dim) {
    const int64_t size = tensor.size(dim);
    if (size == 1) continue;
    int64_t& last_size = sizes[num_dims - 1];
    if (last_size == 1) {
      last_size = size;
      strides[num_dims - 1] = stride(dim);
    } else if (stride(dim) == last_size * strides[num_dims - 1]) {
      last_size *= size;
    } else {
      STD_TORCH_CHECK(num_dims < kMaxRowDims, name, " has more than ", kMaxRowDims,
                      " dimensions that do not lie behind each other in memory; call .contiguous()");
      sizes[num_dims] = size;
      strides[num_dims++] = stride(dim);
    }
  }
  // The widest piece that runs, strides and the address allow.
  if (strides[0] == item) {
    uint64_t all = reinterpret_cast<uintptr_t>(rows.data) | static_cast<uint64_t>(sizes[0] * item) | 16;
    all |= static_cast<uint64_t>(rows.stride_batch | rows.stride_token | rows.stride_head);
    for (int i = 1; i < num_dims; ++i) all |= static_cast<uint64_t>(strides[i]);
    rows.unit = int64_t{1} << std::countr_zero(all);
    sizes[0] = sizes[0] * item / rows.unit;
    strides[0] = rows.unit;
  }
  rows.num_dims = num_dims;
  rows.num_units = 1;
  for (int i = 0; i < num_dims; ++i) {
    rows.sizes[i] = sizes[num_dims - 1 - i];
    rows.strides[i] = strides[num_dims - 1 - i];
    rows.num_units *= rows.sizes[i];
  }
  STD_TORCH_CHECK(rows.num_units < (int64_t{1} << 31), name, " has rows of 2^31 pieces or more");
  return rows;
}

}  // namespace livevlm
