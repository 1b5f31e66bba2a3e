// SPDX-License-Identifier: Apache-2.0
// Calls the kernel of the device that an op's tensors are on. For torch sides only.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/stream.h"
#include "common/tensors.h"

namespace livevlm {

// Runs a CUDA kernel on torch's current stream, with scratch memory that torch owns.
template <typename Params>
void run_cuda(const Params& params, int64_t (*workspace_bytes)(const Params&),
              void (*kernel)(const Params&, void* workspace, void* stream), const Tensor& like) {
  const DeviceGuard guard(like.get_device_index());  // first: how much scratch memory may depend on the GPU
  Tensor workspace =
      torch::stable::new_empty(like, {std::max<int64_t>(workspace_bytes(params), 1)}, ScalarType::Byte);
  kernel(params, workspace.data_ptr(), current_cuda_stream(like.get_device_index()));
}

}  // namespace livevlm

// LIVEVLM_RUN(op, params, like): op_cuda or op_cpu, whichever is for the device of `like`.
#ifdef LIVEVLM_WITH_CUDA
#define LIVEVLM_RUN(op, params, like)                    \
  do {                                                   \
    if (use_cuda(like)) {                                \
      run_cuda(params, op##_workspace, op##_cuda, like); \
    } else {                                             \
      LIVEVLM_CPU_CALL(op##_cpu, params);                \
    }                                                    \
  } while (false)
#else
#define LIVEVLM_RUN(op, params, like) LIVEVLM_CPU_CALL(op##_cpu, params)
#endif
