// SPDX-License-Identifier: Apache-2.0
// Registers the compiled ops with torch's dispatcher. Schemas and shape functions are defined in Python
// (livevlm_kernels/_registry.py), so the package works without this library too.
#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace {

using livevlm::ops::summarize_blocks;  // one function serves every device: it looks at its tensors

void register_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("summarize_blocks", TORCH_BOX(&summarize_blocks));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(livevlm_kernels, CPU, library) {
  register_ops(library);
}

#ifdef LIVEVLM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(livevlm_kernels, CUDA, library) {
  register_ops(library);
}
#endif
