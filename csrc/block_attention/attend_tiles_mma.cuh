// SPDX-License-Identifier: Apache-2.0
// `block_attention` for many rows without warpgroup products: for every GPU from sm_80 on.
//
// A thread block has one row tile of a KV head, or one split of the keys that it sees; each of its four warps
// has 16 or 32 of the rows and all keys, 64 at a time. Logits, weights and sums stay in registers: what a
// product leaves in a thread is what the next one wants there. The keys of a tile to come are brought while
// exponentials are taken and values added up, values while logits are computed; meanwhile another thread
// block keeps the tensor cores busy. As in attend_tiles.cuh, tiles begin at multiples of kKeys whatever the
// row, and one that a row does not see changes none of its bits.
#pragma once

#include "block_attention/pool_tiles.cuh"
#include "block_attention/tile_queries.cuh"
#include "block_attention/tile_results.cuh"

namespace livevlm {

// The image of 64 queries, among which are the warp's; computed anew each time, as are lanes.
template <typename C>
__device__ __forceinline__ unsigned char* image_of_rows(unsigned char* memory) {
  uint32_t thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return memory + thread / 32 * C::kParts16 / 4 * C::kQueryBytes;
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 2)
    attend_tiles_mma_kernel(const __grid_constant__ TileAttention p) {
  using Tiles = std::conditional_t<C::kGathers, PoolTiles<C>, ImageTiles<C>>;
  constexpr int kParts16 = C::kParts16, kStages = C::kStages;
  LIVEVLM_DYNAMIC_SHARED(unsigned char, memory);
  if constexpr (C::kGathers) {
    wait_for_previous_kernels();
    let_next_kernel_start();  // not before: see combine_rows_kernel
  }
  // In shared memory: there are no registers for it.
  TileWork& work = *reinterpret_cast<TileWork*>(memory + C::kWorkAt);
  {
    const TileWork found(p, blockIdx.x, C::kKeys);
    if (!found.exists()) return;
    if (threadIdx.x == 0) work = found;
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp = __shfl_sync(~0u, thread / 32, 0), first_row = warp * (16 * kParts16);
#pragma unroll
  for (int m = 0; m < kParts16; ++m)
    bring_queries<C>(p, work, first_row / 64, first_row / 16 % 4 + m, lane, image_of_rows<C>(memory));
  // Keys are brought kStages tiles before their use, values one less; a group of copies each, empty ones past
  // the last tile.
  constexpr int kPending = 2 * (kStages - 1);
  Tiles tiles(p, work, memory);
#pragma unroll
  for (int32_t tile = 0; tile < kStages; ++tile) {
    if (tile > 0) {
      tiles.bring_values(tile - 1);
      cp_async_commit();
    }
    tiles.bring_keys(tile);
    cp_async_commit();
    if (tile == 0) tiles.load_angles(0);
  }
  Range* const limits = reinterpret_cast<Range*>(memory + C::kLimitsAt) + first_row;
  if (lane < 16 * kParts16) limits[lane] = work.seen(p, first_row + lane);
#pragma unroll
  for (int m = 0; m < kParts16; ++m)
    rotate_queries<C>(p, work, first_row / 64, first_row / 16 % 4 + m, lane, image_of_rows<C>(memory));

  TileSums rows[kParts16];
  [[maybe_unused]] float2* const kept = reinterpret_cast<float2*>(memory + C::kSumsAt) + thread;
  const auto keep_sums = [&](int m) {
    if constexpr (C::kKeepsSums) kept[m * C::kThreads] = make_float2(rows[m].sums[0], rows[m].sums[1]);
  };
  const auto fetch_sums = [&](int m) {
    if constexpr (C::kKeepsSums) {
      const float2 both = kept[m * C::kThreads];
      rows[m].sums[0] = both.x, rows[m].sums[1] = both.y;
    }
  };
#pragma unroll
  for (int m = 0; m < kParts16; ++m) keep_sums(m);
  float sums[kParts16][C::kDim / 2] = {};
#pragma unroll 1
  for (int32_t tile = 0; tile < work.num_tiles; ++tile) {
    const int stage = tile % kStages;
    cp_async_wait<kPending>();
    tiles.rotate(tile);
    __syncthreads();  // its keys are there, and all warps are done with the values before
    tiles.bring_values(tile + kStages - 1);
    cp_async_commit();
    float logits[kParts16][C::kKeys / 2] = {};
    if (first_row < work.tile.num_rows) {
      multiply_keys<C>(logits, image_of_rows<C>(memory) + first_row % 64 * 128,
                       memory + C::kKeysAt + stage * C::kImageBytes);
      const int32_t first_key = (work.first_tile + tile) * C::kKeys;
      const auto* present =
          reinterpret_cast<const uint32_t*>(memory + C::kPresentAt + stage * C::kPresentBytes);
      const bool hidden = C::kGathers ? (present[0] & present[1]) != ~0u : present[kSomeHidden] != 0;
      // Whether the warp's last row sees the first key, and the first row the last one.
      if (hidden || first_key < limits[16 * kParts16 - 1].begin || first_key + C::kKeys > limits[0].end) {
#pragma unroll
        for (int m = 0; m < kParts16; ++m)
          hide_keys<C::kKeys>(logits[m], first_key, lane, present, limits + m * 16 + lane / 4);
      }
    }
    if constexpr (kStages > 1) tiles.load_angles(tile + 1);  // those of the tile after it come next
    cp_async_wait<kPending>();
    __syncthreads();  // its values are there, and all warps are done with its keys
    tiles.bring_keys(tile + kStages);
    cp_async_commit();
    if (first_row >= work.tile.num_rows) continue;
    uint32_t weights[kParts16][C::kKeys / 16][4];
#pragma unroll
    for (int m = 0; m < kParts16; ++m) {
      float shrink[2];
      fetch_sums(m);
      rows[m].template take<C::kKeys>(logits[m], p.scale, shrink);
      keep_sums(m);
#pragma unroll
      for (int j = 0; j < C::kDim / 2; ++j) sums[m][j] *= shrink[j / 2 % 2];
      to_operands<typename C::T, C::kKeys>(weights[m], logits[m]);
    }
    multiply_values<C>(sums, weights, memory + C::kValuesAt + stage * C::kImageBytes);
  }
  cp_async_wait<0>();
  __syncthreads();  // all are done with the queries
#pragma unroll
  for (int m = 0; m < kParts16; ++m) {
    fetch_sums(m);
    store_rows<C>(p, work, rows[m], sums[m], image_of_rows<C>(memory), first_row / 64, first_row / 16 % 4 + m,
                  static_cast<int>(lane_again()));
  }
}

}  // namespace livevlm
