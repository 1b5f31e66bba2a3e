// SPDX-License-Identifier: Apache-2.0
// The compiled ops, with the signatures of their schemas in livevlm_kernels/<op>.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace livevlm::ops {

using torch::stable::Tensor;

void summarize_blocks(const Tensor& k, const std::optional<Tensor>& seq_lens,
                      const std::optional<Tensor>& first_token, int64_t block_size, bool minmax,
                      const Tensor& out);

}  // namespace livevlm::ops
