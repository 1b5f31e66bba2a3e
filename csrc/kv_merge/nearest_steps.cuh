// SPDX-License-Identifier: Apache-2.0
// How keys reach the warpgroups of nearest_wgmma.cuh: the work of a block, what lies where in its shared
// memory, and the warpgroup that copies.
//
// A step is kTileOrphans orphans times kTileSurvivors survivors. All steps of all rows, survivors first, are
// one list of which each block has an equal part, so that a block seldom changes its orphans.
//
// Keys come in panels of 64 elements of each token, as many panels ahead as there is room for. Orphans stay
// for all their steps; their panels come with those of their first survivors, into the same barrier. `slots`
// tiles of orphans have room, so that new ones never land on panels still in use: what lies `stages` panels
// back is done with, and `slots` tiles have at least as many panels.
#pragma once

#include "common/wgmma.cuh"
#include "kv_merge/nearest_survivor.cuh"

namespace livevlm {

inline constexpr int kTileSurvivors = 128, kPanelElements = 64, kTilePanelBytes = 128 * 128;
inline constexpr int kCompareGroups = 2, kNearestGroupThreads = 128;
inline constexpr int kNearestThreads = (kCompareGroups + 1) * kNearestGroupThreads;
inline constexpr int kMostStages = 6, kFewestStages = 4;

struct NearestWgmmaKernel {
  NearestKernel nearest;
  int32_t chunks, stages, slots;  // panels of a key; panels of survivors, and tiles of orphans, in memory
};

inline constexpr int kScaleBytes = kCompareGroups * 2 * kTileSurvivors * 4;

constexpr int64_t nearest_wgmma_bytes(int64_t chunks, int64_t stages, int64_t slots) {
  return (stages + slots * chunks) * kTilePanelBytes + kScaleBytes + stages * 2 * 8;
}

#ifdef LIVEVLM_SM90A

// Addresses in shared memory: panels of survivors, panels of orphans, scales, barriers.
struct NearestMemory {
  char* base;
  uint32_t start, barriers;
  int32_t chunks, stages, slots;

  __device__ __forceinline__ NearestMemory(const NearestWgmmaKernel& p, char* base)
      : base(base),
        start(static_cast<uint32_t>(__cvta_generic_to_shared(base))),
        barriers(start + (p.stages + p.slots * p.chunks) * kTilePanelBytes + kScaleBytes),
        chunks(p.chunks),
        stages(p.stages),
        slots(p.slots) {}
  __device__ __forceinline__ int32_t survivors(int32_t stage) const { return stage * kTilePanelBytes; }
  __device__ __forceinline__ int32_t orphans(int32_t slot, int32_t chunk) const {
    return (stages + slot * chunks + chunk) * kTilePanelBytes;
  }
  __device__ __forceinline__ float* scales(int group) const {  // of two tiles
    return reinterpret_cast<float*>(base + orphans(slots, 0)) + group * 2 * kTileSurvivors;
  }
  __device__ __forceinline__ uint32_t full(int32_t stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int32_t stage) const { return full(stages + stage); }

  // A warp is done with a stage.
  __device__ __forceinline__ void release(int32_t stage) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) shared_barrier_arrive(empty(stage));
  }
};

// A place in a ring, and how often it has been round.
struct Ring {
  int32_t at = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void next(int32_t size) {
    if (++at == size) at = 0, phase ^= 1;
  }
};

// A block's way through its part of the list.
struct NearestSteps {
  int64_t left;
  uint32_t tile, survivors, survivor_tiles;  // which tile of orphans, which of survivors
  bool starts = true;                        // the first step of these orphans, in this block

  __device__ __forceinline__ explicit NearestSteps(const NearestKernel& p)
      : survivor_tiles(static_cast<uint32_t>((p.op.num_groups + kTileSurvivors - 1) / kTileSurvivors)) {
    // Through a shuffle, so that the compiler knows that a warp does not diverge over it.
    const int64_t total = int64_t{__shfl_sync(~0u, *p.num_tiles, 0)} * survivor_tiles;
    const int64_t begin = total * blockIdx.x / gridDim.x;
    left = total * (int64_t{blockIdx.x} + 1) / gridDim.x - begin;
    tile = static_cast<uint32_t>(begin / survivor_tiles);
    survivors = static_cast<uint32_t>(begin % survivor_tiles);
  }
  __device__ __forceinline__ bool ends() const { return left == 1 || survivors + 1 == survivor_tiles; }
  __device__ __forceinline__ void next() {
    starts = ++survivors == survivor_tiles;
    if (starts) survivors = 0, ++tile;
    --left;
  }
  __device__ __forceinline__ int64_t first_row() const { return int64_t{survivors} * kTileSurvivors; }
};

// What a bringing thread copies in a step: a sixteenth of each tile's tokens.
struct BroughtRows {
  static constexpr int kRows = 8;
  int64_t batch = 0;
  int32_t length = 0;                        // tokens from here on do not exist; nor do negative ones
  int32_t orphans[kRows], survivors[kRows];  // orphans only for the step that starts with them

  // Loads, but mostly does not wait for what it loads: `before` are the rows of the step before.
  __device__ __forceinline__ void look_up(const NearestKernel& p, const NearestSteps& steps,
                                          const BroughtRows& before, int row) {
    const MergeTokens& op = p.op;
    batch = before.batch, length = before.length;
    if (steps.starts) {
      const OrphanTile tile = p.tiles[steps.tile];
      batch = tile.batch, length = length_of(op, batch);
      const int32_t count = p.num_orphans[batch];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int32_t orphan = tile.first + row + i * 16;
        orphans[i] = orphan < count ? p.orphans[batch * op.seq_len + orphan] : -1;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t survivor = steps.first_row() + row + i * 16;
      survivors[i] = survivor < op.num_groups ? op.indices[batch * op.num_groups + survivor] : -1;
    }
  }
};

// Eight threads copy a row of a panel, 16 bytes each. Tokens that do not exist, and elements past the end of
// a key, are zeros.
template <typename T>
__device__ __forceinline__ void bring_keys(const NearestKernel& p, const NearestMemory& memory,
                                           NearestSteps steps) {
  const MergeTokens& op = p.op;
  const int thread = static_cast<int>(threadIdx.x) % kNearestGroupThreads, row = thread / 8;
  const int place = row * 128 + (thread % 8 ^ row % 8) * 16;
  const auto width = static_cast<uint32_t>(op.num_heads * op.head_dim);
  Ring stage, slot;
  BroughtRows now, later;
  now.look_up(p, steps, now, row);
  while (steps.left > 0) {
    const T* keys = key_of<T>(op, now.batch, 0);
    const bool starts = steps.starts, ends = steps.ends();
    for (int32_t chunk = 0; chunk < memory.chunks; ++chunk) {
      const auto at = static_cast<uint32_t>(chunk * kPanelElements + thread % 8 * 8);
      const T* piece = at < width ? keys + element_offset(op, at) : nullptr;
      const auto copy = [&](int32_t panel, const int32_t (&tokens)[BroughtRows::kRows]) {
        char* target = memory.base + panel + place;
#pragma unroll
        for (int i = 0; i < BroughtRows::kRows; ++i) {
          const bool exists = piece && static_cast<uint32_t>(tokens[i]) < static_cast<uint32_t>(now.length);
          cp_async16(target + i * 16 * 128, exists ? piece + tokens[i] * op.k.stride_token : keys, exists);
        }
      };
      shared_barrier_wait(memory.empty(stage.at), stage.phase ^ 1);
      copy(memory.survivors(stage.at), now.survivors);
      if (starts) copy(memory.orphans(slot.at, chunk), now.orphans);
      shared_barrier_arrive_copied(memory.full(stage.at));
      stage.next(memory.stages);
      if (chunk > 0) continue;
      steps.next();
      if (steps.left > 0) later.look_up(p, steps, now, row);
    }
    if (ends) slot.next(memory.slots);
    now = later;
  }
  cp_async_commit();
  cp_async_wait<0>();
}

#endif  // LIVEVLM_SM90A

}  // namespace livevlm
