// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace livevlm {

// torch's current CUDA stream on `device_index`, as a cudaStream_t.
void* current_cuda_stream(int32_t device_index);

}  // namespace livevlm
