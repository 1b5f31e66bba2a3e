// SPDX-License-Identifier: Apache-2.0
// Sums over the threads of a block. All threads must call these; each ends with a barrier.
#pragma once

#include <cstdint>

namespace livevlm {

struct Scan {
  uint32_t before;  // sum over the threads before this one
  uint32_t total;   // over all
};

template <int kThreads>
__device__ __forceinline__ Scan block_scan(uint32_t value) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  __shared__ uint32_t warp_sums[kThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t below = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += below;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  Scan scan{inclusive - value, 0};
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    const uint32_t sum = warp_sums[i];
    if (i < warp) scan.before += sum;
    scan.total += sum;
  }
  __syncthreads();
  return scan;
}

}  // namespace livevlm
