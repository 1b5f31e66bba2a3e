// SPDX-License-Identifier: Apache-2.0
// Which survivor each token is most similar to, for `merge_tokens` with indices.
//
// The cosines are a matrix product of the tokens that do not survive and the survivors, of which only the
// largest of each row is kept. A token's own length does not change which is largest, so only survivors are
// scaled.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/number_tokens.cuh"
#include "common/ptx.cuh"
#include "kv_merge/merge_tokens.h"

namespace livevlm {

inline constexpr int kTileOrphans = 128;

struct OrphanTile {
  int32_t batch, first;
};

struct NearestKernel {
  MergeTokens op;
  unsigned long long* nearest;  // [batch, seq_len]: the result, see `nearness`; zero before the launch
  int32_t* orphans;             // [batch, seq_len]: valid tokens that do not survive
  int32_t* num_orphans;         // [batch]
  OrphanTile* tiles;            // all of them, of all rows, kTileOrphans orphans each; in any order
  uint32_t* num_tiles;          // one number, zero before the launch
  float* inverses;              // [batch, num_groups]: 1 / length of a survivor's key; negative: none
  uint32_t survivor_parts;
};

// A survivor's row and how near it is: larger if nearer, then if the row is lower. Never 0.
__device__ __forceinline__ unsigned long long nearness(float cosine, int32_t row) {
  const uint32_t bits = __float_as_uint(cosine + 0.0f);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  // NaN is nearer than nothing only.
  return static_cast<unsigned long long>(cosine == cosine ? key : 0u) << 32 | ~static_cast<uint32_t>(row);
}

__device__ __forceinline__ int32_t row_of(unsigned long long nearest) {
  return nearest == 0 ? -1 : static_cast<int32_t>(~static_cast<uint32_t>(nearest));
}

__device__ __forceinline__ int32_t length_of(const MergeTokens& op, int64_t batch) {
  const int64_t wanted = op.seq_lens ? op.seq_lens[batch] : op.seq_len;
  return static_cast<int32_t>(max(int64_t{0}, min(wanted, op.seq_len)));
}

template <typename T>
__device__ __forceinline__ const T* key_of(const MergeTokens& op, int64_t batch, int64_t token) {
  return static_cast<const T*>(op.k.data) + batch * op.k.stride_batch + token * op.k.stride_token;
}

// Element `at` of a key, its heads one after another.
__device__ __forceinline__ int64_t element_offset(const MergeTokens& op, uint32_t at) {
  const auto head_dim = static_cast<uint32_t>(op.head_dim);
  return int64_t{at / head_dim} * op.k.stride_head + int64_t{at % head_dim} * op.k.stride_dim;
}

inline constexpr int kPrepareThreads =
    1024;  // few blocks list orphans, and each has a whole row to go through

// Survivors keep their own row; orphans are listed, and belong to the first survivor until a comparison finds
// a cosine that is not NaN. One block a row.
__device__ __forceinline__ void list_orphans(const NearestKernel& p, int64_t batch) {
  __shared__ int32_t first_survivor;
  const MergeTokens& op = p.op;
  const int32_t length = length_of(op, batch);
  unsigned long long* nearest = p.nearest + batch * op.seq_len;
  if (threadIdx.x == 0) first_survivor = INT32_MAX;
  __syncthreads();
  int32_t lowest = INT32_MAX;
  for (int64_t row = threadIdx.x; row < op.num_groups; row += kPrepareThreads) {
    const int32_t token = op.indices[batch * op.num_groups + row];
    if (token < 0 || token >= length) continue;
    atomicMax(nearest + token, nearness(INFINITY, static_cast<int32_t>(row)));
    lowest = min(lowest, static_cast<int32_t>(row));
  }
  lowest = __reduce_min_sync(~0u, lowest);
  if (threadIdx.x % 32 == 0) atomicMin(&first_survivor, lowest);
  __syncthreads();
  const int32_t first = first_survivor;
  int32_t* orphans = p.orphans + batch * op.seq_len;
  const auto count = static_cast<int32_t>(number_tokens<kPrepareThreads>(
      length, [&](int32_t token) { return __ldcg(nearest + token) == 0; },
      [&](uint32_t number, int32_t token) {
        orphans[number] = token;
        if (first < INT32_MAX) nearest[token] = nearness(NAN, first);
      }));
  if (threadIdx.x == 0) p.num_orphans[batch] = count;
  if (threadIdx.x >= 32 || first == INT32_MAX) return;
  const int lane = static_cast<int>(threadIdx.x), tiles = (count + kTileOrphans - 1) / kTileOrphans;
  uint32_t place = lane == 0 ? atomicAdd(p.num_tiles, static_cast<uint32_t>(tiles)) : 0;
  place = __shfl_sync(~0u, place, 0);
  for (int32_t i = lane; i < tiles; i += 32) {
    p.tiles[place + i] = {static_cast<int32_t>(batch), i * kTileOrphans};
  }
}

// One warp a survivor.
template <typename T, int kSize>
__device__ __forceinline__ void measure_survivor(const NearestKernel& p, int64_t survivor) {
  const MergeTokens& op = p.op;
  if (survivor >= op.batch * op.num_groups) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t batch = survivor / op.num_groups;
  const int32_t token = op.indices[survivor];
  float inverse = -1.0f;
  if (token >= 0 && token < length_of(op, batch)) {
    const T* key = key_of<T>(op, batch, token);
    const auto width = static_cast<uint32_t>(op.num_heads * op.head_dim);
    float squares = 0.0f;
    for (uint32_t at = lane * kSize; at < width; at += 32 * kSize) {
      Vec<T, kSize> loaded;
      float values[kSize];
      loaded.load(key + element_offset(op, at));
      loaded.widen(values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) squares += values[i] * values[i];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    inverse = squares == 0.0f ? 1.0f : 1.0f / sqrtf(squares);
  }
  if (lane == 0) p.inverses[survivor] = inverse;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_nearest_kernel(const __grid_constant__ NearestKernel p) {
  if (blockIdx.x < p.op.batch) return list_orphans(p, blockIdx.x);
  measure_survivor<T, kSize>(p,
                             (int64_t{blockIdx.x} - p.op.batch) * (kPrepareThreads / 32) + threadIdx.x / 32);
}

// The orphans and survivors that a block compares: a tile of orphans, and a part of the survivors. Tiles that
// are not full, or empty because fewer tokens than might be are orphans, come last, where they fill gaps.
struct NearestTask {
  int64_t batch;
  int32_t first_orphan, num_orphans, first_row, end_row;

  __device__ __forceinline__ NearestTask(const NearestKernel& p, int orphans_per_tile, int rows_per_tile) {
    const uint32_t part = blockIdx.x % p.survivor_parts, rest = blockIdx.x / p.survivor_parts;
    batch = rest % static_cast<uint32_t>(p.op.batch);
    first_orphan = static_cast<int32_t>(rest / static_cast<uint32_t>(p.op.batch)) * orphans_per_tile;
    num_orphans = p.num_orphans[batch];
    const auto tiles = static_cast<uint32_t>((p.op.num_groups + rows_per_tile - 1) / rows_per_tile);
    first_row = static_cast<int32_t>(tiles * part / p.survivor_parts) * rows_per_tile;
    end_row = static_cast<int32_t>(
        min(int64_t{tiles * (part + 1) / p.survivor_parts} * rows_per_tile, p.op.num_groups));
  }
};

}  // namespace livevlm
