// SPDX-License-Identifier: Apache-2.0
// Sorts the tokens of each row by group, in token order within a group: a counting sort by one thread block a
// row.
//
// Each warp owns a stretch of tokens and counts its groups apart; running sums over groups and warps then say
// where each warp's tokens of each group go. No two warps share a counter, so the order does not depend on
// timing. Counters are in shared memory if that is large enough.
#pragma once

#include "common/block_scan.cuh"
#include "common/number_tokens.cuh"
#include "common/ptx.cuh"
#include "kv_merge/nearest_survivor.cuh"

namespace livevlm {

inline constexpr int kOrderThreads = 512;
inline constexpr int kOrderWarps = kOrderThreads / 32;

struct OrderKernel {
  const int32_t* groups;              // [batch, seq_len]; or null, and then
  const unsigned long long* nearest;  // [batch, seq_len]: see nearest_survivor.cuh
  const int32_t* seq_lens;            // [batch] or null
  int64_t batch, seq_len, num_groups;
  uint32_t* counts;  // [batch, kOrderWarps, num_groups], zero before the launch; unused if in shared memory
  int32_t* order;    // [batch, seq_len]
  int32_t* starts;   // [batch, num_groups + 1]
};

inline int64_t order_shared_bytes(int64_t num_groups) {
  return kOrderWarps * num_groups * static_cast<int64_t>(sizeof(uint32_t));
}

template <bool kShared>
__global__ void __launch_bounds__(kOrderThreads)
    order_by_group_kernel(const __grid_constant__ OrderKernel p) {
  LIVEVLM_DYNAMIC_SHARED(uint32_t, shared_counts);
  const int64_t batch = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t wanted = p.seq_lens ? p.seq_lens[batch] : p.seq_len;
  const auto length = static_cast<int32_t>(max(int64_t{0}, min(wanted, p.seq_len)));
  const auto num_groups = static_cast<int32_t>(p.num_groups);
  uint32_t* counts = kShared ? shared_counts : p.counts + batch * kOrderWarps * p.num_groups;
  uint32_t* own_counts = counts + warp * p.num_groups;
  int32_t* order = p.order + batch * p.seq_len;
  int32_t* starts = p.starts + batch * (p.num_groups + 1);
  const Stretch<kOrderThreads> own(length);
  const auto kept = [&](int32_t token) -> int32_t {  // its group, or -1
    if (token >= own.end) return -1;
    const int64_t at = batch * p.seq_len + token;
    const int32_t group = p.groups ? p.groups[at] : row_of(p.nearest[at]);
    return group >= 0 && group < num_groups ? group : -1;
  };

  if constexpr (kShared) {
    for (int i = thread; i < kOrderWarps * num_groups; i += kOrderThreads) counts[i] = 0;
    __syncthreads();
  }
#pragma unroll 4
  for (int32_t base = own.begin; base < own.end; base += 32) {
    const int32_t group = kept(base + lane);
    if (group >= 0) atomicAdd(own_counts + group, 1u);
  }
  __syncthreads();

  uint32_t start = 0;  // of the groups from `first` on
  for (int64_t first = 0; first < num_groups; first += kOrderThreads) {
    const int64_t group = first + thread;
    const bool inside = group < num_groups;
    uint32_t sizes[kOrderWarps], size = 0;
#pragma unroll
    for (int i = 0; i < kOrderWarps; ++i) {
      const uint32_t* count = counts + i * p.num_groups + group;
      sizes[i] = !inside ? 0 : kShared ? *count : __ldcg(count);
    }
#pragma unroll
    for (int i = 0; i < kOrderWarps; ++i) size += sizes[i];
    const Scan scan = block_scan<kOrderThreads>(size);
    if (inside) {
      uint32_t place = start + scan.before;
      starts[group] = static_cast<int32_t>(place);
#pragma unroll
      for (int i = 0; i < kOrderWarps; ++i) {  // from here on: where the warp's next token of the group goes
        counts[i * p.num_groups + group] = place;
        place += sizes[i];
      }
    }
    start += scan.total;
  }
  if (thread == 0) starts[num_groups] = static_cast<int32_t>(start);
  __syncthreads();

  for (int32_t base = own.begin; base < own.end; base += 32) {
    const int32_t group = kept(base + lane);
    const uint32_t same = __match_any_sync(~0u, group);
    const int leader = __ffs(static_cast<int>(same)) - 1;
    uint32_t place = 0;
    if (lane == leader && group >= 0)
      place = atomicAdd(own_counts + group, static_cast<uint32_t>(__popc(same)));
    place = __shfl_sync(~0u, place, leader) + __popc(same & ((1u << lane) - 1));
    if (group >= 0) order[place] = base + lane;
  }
}

}  // namespace livevlm
