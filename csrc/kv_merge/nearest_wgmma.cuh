// SPDX-License-Identifier: Apache-2.0
// The comparison of orphans and survivors on Hopper: for the keys that nearest_mma.cuh takes, with products
// of a whole warpgroup, both of whose matrices lie in shared memory.
//
// A block stays on its multiprocessor. One warpgroup brings keys (nearest_steps.cuh), two others compare 64
// orphans each and take turns: while one looks for its largest cosines, the other's products run. Which block
// or warpgroup does what has no influence on a cosine, and the largest of them no order, so results do not
// depend on how the work is cut.
#pragma once

#include "kv_merge/nearest_steps.cuh"

namespace livevlm {

// Panels that the first group is ahead of the second: about as long as looking for the largest cosines takes.
inline constexpr int kLead = 2;

#ifdef LIVEVLM_SM90A

// A thread's largest cosines: of two orphans, one eight rows below the other, and of each apart of even and
// odd survivors.
struct LargestCosines {
  float cosines[4];
  int32_t rows[4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) cosines[i] = -INFINITY, rows[i] = -1;
  }

  // Only a larger cosine replaces one: the lowest row stays, and NaN is never taken.
  template <int kColumns>
  __device__ __forceinline__ void add(const float (&dots)[64], const float* scales, int32_t first_row) {
    const int column = static_cast<int>(threadIdx.x) % 4 * 2;
    int larger[4] = {-1, -1, -1, -1};
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + i * 8 + column);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float cosine = dots[i * 4 + j] * (j % 2 ? scale.y : scale.x);
        if (cosine > cosines[j]) cosines[j] = cosine, larger[j] = i * 8;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (larger[j] >= 0) rows[j] = first_row + column + j % 2 + larger[j];
    }
  }

  // Of the upper or lower orphan; the four threads that share it all get it.
  __device__ __forceinline__ unsigned long long nearest(int lower) const {
    unsigned long long found = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = lower * 2 + j;
      if (rows[at] >= 0) found = max(found, nearness(cosines[at], rows[at]));
    }
    found = max(found, __shfl_xor_sync(~0u, found, 1));
    return max(found, __shfl_xor_sync(~0u, found, 2));
  }
};

// The products of 64 orphans and kColumns survivors, panel by panel. One panel's products run while the next
// one's are started. Returns `inverse`, or a negative number if that is null: loaded with the last products,
// since the fence before products waits for loads.
template <typename T, int kColumns>
__device__ __forceinline__ float multiply(float (&dots)[64], const NearestMemory& memory, int group,
                                          Ring& stage, int32_t slot, bool leads, const float* inverse) {
  int32_t before = 0;
  float loaded = -1.0f;
  for (int32_t chunk = 0; chunk < memory.chunks; ++chunk) {
    const uint64_t orphans =
        wgmma_descriptor(memory.start + memory.orphans(slot, chunk) + group * (kTilePanelBytes / 2));
    const uint64_t survivors = wgmma_descriptor(memory.start + memory.survivors(stage.at));
    shared_barrier_wait(memory.full(stage.at), stage.phase);
    wgmma_fence_shared();
    wgmma_arrive();
#pragma unroll
    for (int step = 0; step < kPanelElements / 16; ++step) {
      wgmma_shared<kColumns>(dots, orphans + 2 * step, survivors + 2 * step, chunk > 0 || step > 0,
                             TypeTag<T>{});
    }
    wgmma_commit();
    if (inverse && chunk + 1 == memory.chunks) loaded = *inverse;
    if (leads && chunk + 1 == min(kLead, memory.chunks)) named_barrier_arrive(1, 2 * kNearestGroupThreads);
    if (chunk > 0) {
      wgmma_wait<1>();
      memory.release(before);
    }
    before = stage.at;
    stage.next(memory.stages);
  }
  wgmma_wait<0>();
  wgmma_landed(dots);
  memory.release(before);
  return loaded;
}

template <typename T>
__device__ __forceinline__ void compare_keys(const NearestKernel& p, const NearestMemory& memory,
                                             NearestSteps steps, int group) {
  const MergeTokens& op = p.op;
  const int thread = static_cast<int>(threadIdx.x) % kNearestGroupThreads, lane = thread % 32;
  Ring stage, slot, scales;
  LargestCosines largest;
  OrphanTile tile{};
  int32_t tokens[2];  // the thread's orphans, or -1
  bool idle = false, first = true;
  float dots[64];
  if (group > 0) named_barrier_wait(1, 2 * kNearestGroupThreads);
  for (; steps.left > 0; steps.next(), first = false) {
    if (steps.starts) {
      tile = p.tiles[steps.tile];
      const int32_t count = p.num_orphans[tile.batch];
      idle = tile.first + group * 64 >= count;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t orphan = tile.first + group * 64 + thread / 32 * 16 + lane / 4 + i * 8;
        tokens[i] = orphan < count ? p.orphans[tile.batch * op.seq_len + orphan] : -1;
      }
      largest.clear();
    }
    const auto first_row = static_cast<int32_t>(steps.first_row());
    const int64_t rows = op.num_groups - first_row;
    const bool few = rows <= kTileSurvivors / 2;
    if (idle) {  // keeps up, so that the other group's panels are not held back
      for (int32_t chunk = 0; chunk < memory.chunks; ++chunk, stage.next(memory.stages)) {
        shared_barrier_wait(memory.full(stage.at), stage.phase);
        memory.release(stage.at);
      }
    } else {
      const float* own =
          thread < rows ? p.inverses + tile.batch * op.num_groups + first_row + thread : nullptr;
      const bool leads = group == 0 && first;
      const float inverse = few ? multiply<T, 64>(dots, memory, group, stage, slot.at, leads, own)
                                : multiply<T, 128>(dots, memory, group, stage, slot.at, leads, own);
      // Two tables in turn: a thread that writes one has waited until all have read what it held.
      float* table = memory.scales(group) + scales.at * kTileSurvivors;
      table[thread] = inverse >= 0.0f ? inverse : NAN;
      named_barrier_wait(2 + group, kNearestGroupThreads);
      few ? largest.add<64>(dots, table, first_row) : largest.add<128>(dots, table, first_row);
      scales.next(2);
    }
    if (!steps.ends()) continue;
    slot.next(memory.slots);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned long long found = largest.nearest(i);
      if (lane % 4 == 0 && tokens[i] >= 0 && found > 0) {
        atomicMax(p.nearest + tile.batch * op.seq_len + tokens[i], found);
      }
    }
  }
}

#endif  // LIVEVLM_SM90A

template <typename T>
__global__ void __launch_bounds__(kNearestThreads, 1)
    nearest_wgmma_kernel(const __grid_constant__ NearestWgmmaKernel p) {
#ifdef LIVEVLM_SM90A
  extern __shared__ __align__(1024) unsigned char nearest_memory[];
  const NearestMemory memory(p, reinterpret_cast<char*>(nearest_memory));
  const NearestSteps steps(p.nearest);
  if (steps.left == 0) return;
  if (threadIdx.x == 0) {
    for (int32_t stage = 0; stage < p.stages; ++stage) {
      shared_barrier_init(memory.full(stage), kNearestGroupThreads);
      shared_barrier_init(memory.empty(stage), kCompareGroups * kNearestGroupThreads / 32);
    }
  }
  __syncthreads();
  // Through a shuffle, so that the compiler knows that a warp does not diverge over it.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kNearestGroupThreads, 0);
  if (group == kCompareGroups) {
    bring_keys<T>(p.nearest, memory, steps);
  } else {
    compare_keys<T>(p.nearest, memory, steps, group);
  }
#endif
}

}  // namespace livevlm
