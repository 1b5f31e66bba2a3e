// SPDX-License-Identifier: Apache-2.0
// Numbers some of a row's tokens, in order, with one thread block.
#pragma once

#include <cstdint>

namespace livevlm {

// Tokens are dealt to warps in whole stretches, so that counting and numbering them needs one barrier each.
template <int kThreads>
struct Stretch {
  int32_t begin, end;

  __device__ __forceinline__ explicit Stretch(int32_t length) {
    constexpr int kWarps = kThreads / 32;
    const int64_t words = (int64_t{length} + 31) / 32, warp = threadIdx.x / 32;
    begin = static_cast<int32_t>(words * warp / kWarps * 32);
    end = static_cast<int32_t>(min(words * (warp + 1) / kWarps * 32, int64_t{length}));
  }
};

// Numbers the tokens that `taken(token)` names, in order; calls write(number, token) for each. Returns their
// number.
template <int kThreads, typename Taken, typename Write>
__device__ __forceinline__ uint32_t number_tokens(int32_t length, Taken taken, Write write) {
  __shared__ uint32_t warp_counts[kThreads / 32];
  const Stretch<kThreads> own(length);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t count = 0;
  for (int32_t base = own.begin; base < own.end; base += 32) {
    const int32_t token = base + lane;
    count += __popc(__ballot_sync(~0u, token < own.end && taken(token)));
  }
  if (lane == 0) warp_counts[warp] = count;
  __syncthreads();
  uint32_t number = 0, total = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) number += warp_counts[i];
    total += warp_counts[i];
  }
  for (int32_t base = own.begin; base < own.end; base += 32) {
    const int32_t token = base + lane;
    const bool mine = token < own.end && taken(token);
    const uint32_t mask = __ballot_sync(~0u, mine);
    if (mine) write(number + __popc(mask & ((1u << lane) - 1)), token);
    number += __popc(mask);
  }
  __syncthreads();
  return total;
}

}  // namespace livevlm
