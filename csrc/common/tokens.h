// SPDX-License-Identifier: Apache-2.0
// How kernels see tensors of tokens: a pointer and strides.
#pragma once

#include <cstdint>

namespace livevlm {

// [batch, tokens, heads, dim] of float32, float16 or bfloat16; strides in elements.
struct Tokens {
  void* data;
  int64_t stride_batch, stride_token, stride_head, stride_dim;
};

inline constexpr int kMaxRowDims = 4;

// [batch, tokens, (heads,) ...] of any dtype, as rows of bytes to move. A row is what one token (of one head,
// if `stride_head` is in use) holds: `num_units` pieces of `unit` bytes, laid out by `sizes` and `strides`,
// of which the last is the fastest. All strides in bytes.
struct Rows {
  char* data;
  int64_t stride_batch, stride_token, stride_head;
  int64_t unit;       // 1, 2, 4, 8 or 16; every piece is aligned to it
  int64_t num_units;  // below 2^31
  int num_dims;
  int64_t sizes[kMaxRowDims];  // in units
  int64_t strides[kMaxRowDims];
};

// Where piece `index` of a row lies, in bytes from the row's start.
#ifdef __CUDACC__
__host__ __device__
#endif
    inline int64_t piece_offset(const Rows& rows, uint32_t index) {
  if (rows.num_dims == 1) return int64_t{index} * rows.strides[0];
  int64_t offset = 0;
  for (int dim = rows.num_dims - 1; dim >= 0; --dim) {
    const auto size = static_cast<uint32_t>(rows.sizes[dim]);
    offset += int64_t{index % size} * rows.strides[dim];
    index /= size;
  }
  return offset;
}

}  // namespace livevlm
