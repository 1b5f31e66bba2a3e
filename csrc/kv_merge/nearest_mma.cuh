// SPDX-License-Identifier: Apache-2.0
// The comparison of orphans and survivors on tensor cores, for 16-bit keys in rows that can be read 16 bytes
// at a time.
//
// Products of 16-bit floats are exact in float32, so this is as accurate as float32 arithmetic on the same
// keys. A tile of orphans stays in shared memory while survivors stream past, kMmaDepth elements (a chunk of
// a key) at a time, kStages - 1 chunks ahead of their use. Which survivors, and where their keys are, is
// looked up a few tiles earlier still, so that no copy waits for it.
//
// A thread reads 16 bytes of a row at once: eight elements that it uses in two matrix products. That is
// another order of the elements than the instruction names, but the same for both operands, and a dot product
// has no order.
#pragma once

#include "kv_merge/nearest_survivor.cuh"

namespace livevlm {

inline constexpr int kMmaThreads = 256, kMmaRows = 128, kMmaDepth = 64, kStages = 4;
inline constexpr int kChunkBytes = kMmaDepth * 2;  // of one key
inline constexpr int kStageBytes = kMmaRows * kChunkBytes;
inline constexpr int kTables = kStages + 2;  // of survivors: being used, copied, looked at next and written

// Odd rows have their halves exchanged, so that eight threads with two rows read from different banks.
__device__ __forceinline__ int half_of(int row, int half) {
  return row * kChunkBytes + (half ^ row % 2) * (kChunkBytes / 2);
}

// Two products' worth of fragments: 16 bytes of each of a matrix's rows.
struct Fragment {
  uint4 words;

  __device__ __forceinline__ void load(const char* chunk, int row, int half) {
    words = *reinterpret_cast<const uint4*>(chunk + half_of(row, half) + threadIdx.x % 4 * 16);
  }
};

// A tile of survivors.
struct SurvivorTable {
  int64_t offsets[kMmaRows];  // of their keys; negative: no survivor
  float scales[kMmaRows];     // 1 / length, or NaN: a cosine that is not the largest
};

template <int kOrphans>
inline constexpr int64_t kMmaStaticBytes = kTables * sizeof(SurvivorTable) + kOrphans * 16 + 128;

// Orphans, stages, and where the pieces of a key are.
constexpr int64_t mma_dynamic_bytes(int64_t orphans, int64_t chunks) {
  return chunks * orphans * kChunkBytes + kStages * kStageBytes + chunks * 8 * int64_t{sizeof(int64_t)};
}

template <typename T, int kOrphans>
struct MmaTile {
  static constexpr int kWarpsDown = kOrphans / 32, kWarpsAcross = 8 / kWarpsDown;
  static constexpr int kAcross = kMmaRows / kWarpsAcross, kTiles = kAcross / 8;  // of 8 survivors, in a warp
  float dots[2][kTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles * 4; ++i) (&dots[0][0][0])[i] = 0.0f;
  }

  // Adds the products of a chunk: 32 orphans and `tiles` * 8 survivors a warp.
  __device__ __forceinline__ void multiply(const char* orphan_chunk, int down, const char* survivor_chunk,
                                           int across, int tiles) {
    const int row = static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Fragment orphans[2][2];  // [16 rows][upper and lower 8]
#pragma unroll
      for (int i = 0; i < 4; ++i) orphans[i / 2][i % 2].load(orphan_chunk, down + i * 8 + row, half);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile >= tiles) break;
        Fragment survivors;
        survivors.load(survivor_chunk, across + tile * 8 + row, half);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 upper = orphans[i][0].words, lower = orphans[i][1].words, other = survivors.words;
          mma_m16n8k16(dots[i][tile], {upper.x, lower.x, upper.y, lower.y}, {other.x, other.y}, TypeTag<T>{});
          mma_m16n8k16(dots[i][tile], {upper.z, lower.z, upper.w, lower.w}, {other.z, other.w}, TypeTag<T>{});
        }
      }
    }
  }
};

template <typename T, int kOrphans>
__global__ void __launch_bounds__(kMmaThreads, 1)
    nearest_mma_kernel(const __grid_constant__ NearestKernel p) {
  using Tile = MmaTile<T, kOrphans>;
  LIVEVLM_DYNAMIC_SHARED(char, memory);
  __shared__ SurvivorTable tables[kTables];
  __shared__ int64_t orphan_offsets[kOrphans];
  __shared__ unsigned long long best[kOrphans];
  const MergeTokens& op = p.op;
  const NearestTask task(p, kOrphans, kMmaRows);
  if (task.first_orphan >= task.num_orphans || task.first_row >= task.end_row) return;
  const auto width = static_cast<uint32_t>(op.num_heads * op.head_dim);
  const auto chunks = static_cast<int>((width + kMmaDepth - 1) / kMmaDepth);
  const int tiles = (task.end_row - task.first_row + kMmaRows - 1) / kMmaRows;
  char* stages = memory + chunks * kOrphans * kChunkBytes;
  auto* pieces = reinterpret_cast<int64_t*>(stages + kStages * kStageBytes);  // 16 bytes each; negative: none
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int down = warp / Tile::kWarpsAcross * 32, across = warp % Tile::kWarpsAcross * Tile::kAcross;
  const int32_t orphan = task.first_orphan + thread;
  const bool has_orphan = thread < kOrphans && orphan < task.num_orphans;
  const int64_t own_token = has_orphan ? p.orphans[task.batch * op.seq_len + orphan] : -1;
  if (thread < kOrphans) {
    best[thread] = 0;
    orphan_offsets[thread] = has_orphan ? own_token * op.k.stride_token : -1;
  }
  for (int i = thread; i < chunks * 8; i += kMmaThreads) {
    const auto at = static_cast<uint32_t>(i * 8);
    pieces[i] = at < width ? element_offset(op, at) : -1;
  }

  // The first kMmaRows threads look up a survivor each, and write it to the tile's table later.
  struct Survivor {
    int32_t token;
    float inverse;
  };
  const auto look_up = [&](int tile) {
    Survivor found{0, -1.0f};
    const int64_t row = task.first_row + int64_t{tile} * kMmaRows + thread;
    if (thread < kMmaRows && row < task.end_row) {
      found.inverse = p.inverses[task.batch * op.num_groups + row];
      found.token = op.indices[task.batch * op.num_groups + row];
    }
    return found;
  };
  const auto put = [&](int tile, const Survivor& found) {
    if (thread >= kMmaRows) return;
    const bool valid = !(found.inverse < 0.0f);
    SurvivorTable& table = tables[tile % kTables];
    table.offsets[thread] = valid ? found.token * op.k.stride_token : -1;
    table.scales[thread] = valid ? found.inverse : NAN;
  };

  // Starts the copy of the next chunk of survivors and, the first time, of orphans. Elements past the end of
  // a row, and rows past the end, are zeros. Always ends a group of copies, if an empty one. `aim` is called
  // before and finds out what is next: apart, so that it can be done while there is nothing to wait for.
  constexpr int kCopied = kMmaRows / 32;  // rows a thread has a piece of
  const T* keys = key_of<T>(op, task.batch, 0);
  const T* sources[kCopied];  // null: no survivor
  int64_t piece = -1;
  int next_tile = 0, next_chunk = 0, next_stage = 0;
  const auto aim = [&] {
    if (next_tile >= tiles) return;
    piece = pieces[next_chunk * 8 + thread % 8];
    if (next_chunk > 0) return;
#pragma unroll
    for (int i = 0; i < kCopied; ++i) {
      const int64_t offset = tables[next_tile % kTables].offsets[thread / 8 + i * 32];
      sources[i] = offset < 0 ? nullptr : keys + offset;
    }
  };
  const auto fetch = [&] {
    if (next_tile < tiles) {
      const int place = half_of(thread / 8, thread % 8 / 4) + thread % 4 * 16;
      const auto copy = [&](char* chunk, int i, const T* source) {
        const bool valid = piece >= 0 && source;
        cp_async16(chunk + place + i * 32 * kChunkBytes, valid ? source + piece : keys, valid);
      };
#pragma unroll
      for (int i = 0; i < kCopied; ++i) copy(stages + next_stage * kStageBytes, i, sources[i]);
      if (next_tile == 0) {
        for (int i = 0; i < kOrphans / 32; ++i) {
          const int64_t offset = orphan_offsets[thread / 8 + i * 32];
          copy(memory + next_chunk * kOrphans * kChunkBytes, i, offset < 0 ? nullptr : keys + offset);
        }
      }
      next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
      if (++next_chunk == chunks) next_chunk = 0, ++next_tile;
    }
    cp_async_commit();
  };

  Survivor ahead[kTables - 1];
#pragma unroll
  for (int tile = 0; tile < kTables - 1; ++tile) ahead[tile] = look_up(tile);
#pragma unroll
  for (int tile = 0; tile < kTables - 1; ++tile) put(tile, ahead[tile]);
  __syncthreads();
  for (int i = 0; i < kStages - 1; ++i) aim(), fetch();
  aim();

  // A thread has four rows and, of each, two survivors next to each other in 8.
  Tile tile_of_warp;
  float cosines[4];
  int32_t rows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) cosines[i] = -INFINITY, rows[i] = -1;
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int32_t first = task.first_row + tile * kMmaRows + across;
    const bool idle = task.first_orphan + down >= task.num_orphans || first >= task.end_row;
    const int active = idle ? 0 : min((task.end_row - first + 7) / 8, Tile::kTiles);
    tile_of_warp.clear();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the chunk is there, and the one before and its tile's table are free
      fetch();
      // `aim` is up to kStages tiles ahead; this table is read after the next barrier at the earliest.
      Survivor later;
      if (chunk == 0) later = look_up(tile + kTables - 1);
      const char* orphan_chunk = memory + chunk * kOrphans * kChunkBytes;
      const char* survivor_chunk = stages + stage * kStageBytes;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if (active == Tile::kTiles) {  // without branches
        tile_of_warp.multiply(orphan_chunk, down, survivor_chunk, across, Tile::kTiles);
      } else if (active > 0) {
        tile_of_warp.multiply(orphan_chunk, down, survivor_chunk, across, active);
      }
      aim();
      if (chunk == 0) put(tile + kTables - 1, later);
    }

    // Only a larger cosine replaces one: the lowest row stays, and NaN is never taken.
    const float* scales = tables[tile % kTables].scales + across + lane % 4 * 2;
    int larger[4] = {-1, -1, -1, -1};
#pragma unroll
    for (int i = 0; i < Tile::kTiles; ++i) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + i * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float left = tile_of_warp.dots[j / 2][i][j % 2 * 2] * scale.x;
        const float right = tile_of_warp.dots[j / 2][i][j % 2 * 2 + 1] * scale.y;
        if (left > cosines[j]) cosines[j] = left, larger[j] = i * 8;
        if (right > cosines[j]) cosines[j] = right, larger[j] = i * 8 + 1;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (larger[j] >= 0) rows[j] = first + lane % 4 * 2 + larger[j];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (rows[j] >= 0) atomicMax(&best[down + j * 8 + lane / 4], nearness(cosines[j], rows[j]));
  }
  __syncthreads();
  const unsigned long long found = has_orphan ? best[thread] : 0;
  if (found) atomicMax(p.nearest + task.batch * op.seq_len + own_token, found);
}

}  // namespace livevlm
