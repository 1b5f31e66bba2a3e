// SPDX-License-Identifier: Apache-2.0
#include "block_attention/attend_codes_launch.cuh"

namespace livevlm {

void launch_int4(const AttentionKernel& kernel, WarpWork work, cudaStream_t stream) {
  launch_format<Int4>(kernel, work, stream);
}

}  // namespace livevlm
