// SPDX-License-Identifier: Apache-2.0
// Torch side of `block_attention`: unpacks the tensors and calls the kernel of their device.
#include "block_attention/block_attention.h"

#include "common/launch.h"
#include "common/token_tensors.h"
#include "ops.h"

namespace livevlm::ops {
namespace {

struct Positions {
  const void* data;
  bool int64;
};

Positions positions_of(const std::optional<Tensor>& tensor, const char* name, int64_t numel,
                       const Tensor& like) {
  if (!tensor) return {nullptr, false};
  const bool int64 = tensor->scalar_type() == ScalarType::Long;
  return {contiguous_data<void>(*tensor, name, int64 ? ScalarType::Long : ScalarType::Int, numel, like),
          int64};
}

// Scales of a pool that is not floats, or null.
const void* scale_of(const std::optional<Tensor>& tensor, const char* name, bool int4, int64_t numel,
                     const Tensor& q) {
  if (!tensor) return nullptr;
  return contiguous_data<void>(*tensor, name, int4 ? ScalarType::Half : ScalarType::Float, numel, q);
}

}  // namespace

std::tuple<Tensor, Tensor> block_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_table, const Tensor& seq_lens,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& positions,
    const std::optional<Tensor>& cos_sin_cache, const std::optional<Tensor>& q_positions, bool packed,
    double sm_scale, bool causal, int64_t window, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale) {
  const auto [num_blocks, block_size, num_heads, row_size] = sizes_of<4>(k, "k");
  const bool bytes = k_scale.has_value(), int4 = bytes && k_scale->dim() == 4;
  const int64_t head_dim = int4 ? row_size * 2 : row_size;
  const auto [total_q, num_qo_heads, q_dim] = sizes_of<3>(q, "q");
  check_same_device(q, "q", k);
  STD_TORCH_CHECK(bytes == v_scale.has_value(), "k_scale needs v_scale");
  STD_TORCH_CHECK(k.scalar_type() == (bytes ? ScalarType::Byte : q.scalar_type()), "k has the wrong dtype");
  STD_TORCH_CHECK(q_dim == head_dim && num_heads > 0 && num_qo_heads % num_heads == 0,
                  "q does not have the head_dim and a multiple of the heads of k");
  STD_TORCH_CHECK(num_blocks * block_size > 0 && total_q > 0, "q and k must not be empty");
  STD_TORCH_CHECK(total_q * num_qo_heads < int64_t{1} << 31, "q has 2^31 rows or more");

  check_same_device(block_table, "block_table", k);
  STD_TORCH_CHECK(block_table.scalar_type() == ScalarType::Int, "block_table must be int32");
  const bool per_head = block_table.dim() == 3;
  STD_TORCH_CHECK((per_head && block_table.size(1) == num_heads) || block_table.dim() == 2,
                  "block_table must be [batch, max_blocks] or [batch, num_kv_heads, max_blocks]");
  const int64_t batch = block_table.size(0), max_blocks = block_table.size(block_table.dim() - 1);
  STD_TORCH_CHECK(batch * max_blocks > 0, "block_table must not be empty");
  STD_TORCH_CHECK(cu_seqlens_q || total_q % batch == 0, "total_q must be a multiple of the batch");
  // A copy only if entries of a row are not neighbours.
  Tensor table = max_blocks == 1 || block_table.stride(block_table.dim() - 1) == 1
                     ? block_table
                     : torch::stable::contiguous(block_table);

  const int64_t max_position = cos_sin_cache ? sizes_of<2>(*cos_sin_cache, "cos_sin_cache")[0] : 0;
  const bool half = cos_sin_cache && cos_sin_cache->scalar_type() == ScalarType::Half;
  Tensor cache = cos_sin_cache ? torch::stable::contiguous(*cos_sin_cache) : k;
  STD_TORCH_CHECK(!cos_sin_cache || (head_dim % 2 == 0 && max_position > 0 && (packed || positions)),
                  "RoPE needs an even head_dim and positions");
  STD_TORCH_CHECK(cos_sin_cache || (!packed && !q_positions), "positions need cos_sin_cache");
  const auto k_positions = positions_of(positions, "positions", num_blocks * block_size, k);
  const auto own_positions = positions_of(q_positions, "q_positions", total_q, k);

  Tensor out = torch::stable::new_empty(q, {total_q, num_qo_heads, head_dim});
  Tensor lse = torch::stable::new_empty(q, {total_q, num_qo_heads}, ScalarType::Float);
  const auto [q_token, q_head, q_element] = strides_of<3>(q);
  const BlockAttention params{
      .q = {q.data_ptr(), 0, q_token, q_head, q_element},
      .k = tokens_of(k),
      .v = tokens_like(v, "v", k),
      .dtype = float_dtype(q, "q"),
      .format = !bytes ? PoolFormat::kFloats
                : int4 ? PoolFormat::kInt4
                       : PoolFormat::kFp8,
      .k_scale = scale_of(k_scale, "k_scale", int4, num_blocks * num_heads * (int4 ? head_dim * 2 : 1), q),
      .v_scale = scale_of(v_scale, "v_scale", int4, num_blocks * num_heads * (int4 ? block_size * 2 : 1), q),
      .total_q = total_q,
      .num_blocks = num_blocks,
      .block_size = block_size,
      .num_heads = num_heads,
      .group_size = num_qo_heads / num_heads,
      .head_dim = head_dim,
      .batch = batch,
      .max_blocks = max_blocks,
      .block_table = static_cast<const int32_t*>(table.data_ptr()),
      .table_stride_batch = table.stride(0),
      .table_stride_head = per_head ? table.stride(1) : 0,
      .seq_lens = contiguous_data<const int32_t>(seq_lens, "seq_lens", ScalarType::Int, batch, k),
      .cu_seqlens_q = optional_int32(cu_seqlens_q, "cu_seqlens_q", batch + 1, k),
      .positions = k_positions.data,
      .positions_int64 = k_positions.int64,
      .cos_sin_cache = cos_sin_cache
                           ? contiguous_data<const void>(cache, "cos_sin_cache",
                                                         half ? ScalarType::Half : ScalarType::Float,
                                                         max_position * head_dim, k)
                           : nullptr,
      .cos_sin_half = half,
      .max_position = max_position,
      .q_positions = own_positions.data,
      .q_positions_int64 = own_positions.int64,
      .packed = packed,
      .sm_scale = static_cast<float>(sm_scale),
      .causal = causal,
      .window = window,
      .out = out.data_ptr(),
      .lse = static_cast<float*>(lse.data_ptr()),
  };
  LIVEVLM_RUN(block_attention, params, k);
  return {out, lse};
}

}  // namespace livevlm::ops
