// SPDX-License-Identifier: Apache-2.0
// Registers the compiled ops with torch's dispatcher. Schemas and shape functions are defined in Python
// (livevlm_kernels/_registry.py), so the package works without this library too.
#include <torch/csrc/stable/library.h>

#include "ops.h"

#ifdef LIVEVLM_EMULATED  // CUDA kernels, run on CPU tensors by tests/emulation
#define LIVEVLM_OVERLOAD(op) #op ".emulated"
#else
#define LIVEVLM_OVERLOAD(op) #op
#endif
#define LIVEVLM_IMPL(op) library.impl(LIVEVLM_OVERLOAD(op), TORCH_BOX(&op))

namespace {

using namespace livevlm::ops;  // one function serves every device: it looks at its tensors

void register_ops(torch::stable::detail::StableLibrary& library) {
  LIVEVLM_IMPL(block_attention);
  LIVEVLM_IMPL(compact_tokens);
  LIVEVLM_IMPL(evict_similar);
  LIVEVLM_IMPL(merge_states);
  LIVEVLM_IMPL(merge_tokens);
  LIVEVLM_IMPL(quantize_blocks);
  LIVEVLM_IMPL(retrieve_blocks);
  LIVEVLM_IMPL(score_novelty);
  LIVEVLM_IMPL(score_redundancy);
  LIVEVLM_IMPL(score_tokens);
  LIVEVLM_IMPL(select_tokens);
  LIVEVLM_IMPL(summarize_blocks);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livevlm_kernels, CPU, library) {
  register_ops(library);
}

#if defined(LIVEVLM_WITH_CUDA) && !defined(LIVEVLM_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(livevlm_kernels, CUDA, library) {
  register_ops(library);
}
#endif
