// SPDX-License-Identifier: Apache-2.0
// The compiled ops, with the signatures of their schemas in livevlm_kernels/<op>.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace livevlm::ops {

using torch::stable::Tensor;

void summarize_blocks(const Tensor& k, const std::optional<Tensor>& seq_lens,
                      const std::optional<Tensor>& first_token, int64_t block_size, bool minmax,
                      const Tensor& out);

Tensor score_tokens(const Tensor& q, const Tensor& k, const std::optional<Tensor>& seq_lens,
                    const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin_cache,
                    double sm_scale, bool causal, bool per_head, int64_t num_shared);

std::tuple<Tensor, Tensor> score_redundancy(const Tensor& k, const Tensor& v, const Tensor& recent_k,
                                            const Tensor& slots, const std::optional<Tensor>& seq_lens,
                                            bool per_head);

std::tuple<Tensor, Tensor> score_novelty(const Tensor& x, const Tensor& usual, const Tensor& slots,
                                         const Tensor& previous, const std::optional<Tensor>& seq_lens);

std::tuple<Tensor, Tensor> select_tokens(const Tensor& scores, const std::optional<Tensor>& seq_lens,
                                         const std::optional<Tensor>& buckets, int64_t budget,
                                         int64_t num_top, int64_t num_buckets, int64_t bucket_capacity);

void compact_tokens(std::vector<Tensor> tensors, const Tensor& indices, bool per_head);

std::tuple<Tensor, Tensor> evict_similar(const Tensor& k, const Tensor& v, const Tensor& slots,
                                         std::vector<Tensor> tensors, int64_t budget,
                                         int64_t num_recent_frames, int64_t tokens_per_frame,
                                         int64_t num_dissimilar, bool per_head, int64_t num_shared);

std::tuple<Tensor, Tensor, Tensor> merge_tokens(const Tensor& k, const Tensor& v,
                                                const std::optional<Tensor>& groups,
                                                const std::optional<Tensor>& indices,
                                                const std::optional<Tensor>& sizes,
                                                const std::optional<Tensor>& weights,
                                                const std::optional<Tensor>& seq_lens, int64_t num_groups);

std::tuple<Tensor, Tensor> retrieve_blocks(const Tensor& q, const Tensor& keys,
                                           const std::optional<Tensor>& seq_lens, int64_t kind, bool softmax,
                                           int64_t num_selected, std::optional<double> ratio,
                                           int64_t block_size, int64_t num_sink_blocks,
                                           int64_t num_recent_blocks, bool per_head, double sm_scale);

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_blocks(const Tensor& k, const Tensor& v,
                                                           const std::optional<Tensor>& positions, bool int4);

std::tuple<Tensor, Tensor> block_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_table, const Tensor& seq_lens,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& positions,
    const std::optional<Tensor>& cos_sin_cache, const std::optional<Tensor>& q_positions, bool packed,
    double sm_scale, bool causal, int64_t window, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale);

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses);

}  // namespace livevlm::ops
