// SPDX-License-Identifier: Apache-2.0
// `score_tokens` on Hopper, as score_mma.cuh, but with products of a whole warpgroup: 64 keys from registers
// times 64 rows from shared memory. Three warpgroups take turns: one's products run while the others take
// exponentials.
//
// Shared memory holds rows in panels of 64 elements, 128 bytes, whose 16-byte chunks are swizzled by the row,
// as the instruction wants them. Within 32 elements the order is that of the keys in registers
// (score_keys.cuh): word w is word 4 * (w % 4) + w / 4 of the row.
#pragma once

#include "common/wgmma.cuh"
#include "kv_evict/score_keys.cuh"
#include "kv_evict/score_sums.cuh"

namespace livevlm {

inline constexpr int kGroupThreads = 128, kScoreGroups = 3, kWgmmaThreads = kGroupThreads * kScoreGroups;
inline constexpr int kGroupTokens = 64, kWgmmaTileTokens = kGroupTokens * kScoreGroups, kGroupRows = 64;
inline constexpr int kPanelBytes = 128;  // of a row

// Bytes of shared memory for one row in all panels, and its running sums in every warp.
template <int kDim>
inline constexpr int kWgmmaRowBytes = kDim * 2 + kWgmmaThreads / 32 * 2 * 4;

template <typename T, int kDim, bool kSecond>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    score_wgmma_kernel(const __grid_constant__ ScoreKernel p) {
#ifdef LIVEVLM_SM90A
  constexpr int kPanels = kDim / 64;
  extern __shared__ __align__(1024) unsigned char wgmma_memory[];
  char* const memory = reinterpret_cast<char*>(wgmma_memory);
  const ScoreTask task(p);
  let_next_kernel_start();
  // Through a shuffle, so that the compiler knows that a warp does not diverge over it.
  const int thread = static_cast<int>(threadIdx.x), warp = __shfl_sync(~0u, thread / 32, 0);
  const int group = warp / 4;
  const int panel_bytes = p.block_rows * kPanelBytes;
  float* const vectors = reinterpret_cast<float*>(memory + kPanels * panel_bytes);
  float* const tops = vectors + warp * 2 * p.block_rows;  // first pass: each warp has its own running sums
  float* const sums = tops + p.block_rows;
  const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const bool rope = p.op.positions != nullptr;

  if (group == kScoreGroups - 1) named_barrier_arrive(1, 2 * kGroupThreads);  // the first group starts
  for (int32_t first_row = 0; first_row < p.num_rows; first_row += p.block_rows) {
    const int32_t num_rows = min(p.num_rows - first_row, p.block_rows);
    const int32_t padded = (num_rows + kGroupRows - 1) / kGroupRows * kGroupRows;
    __syncthreads();  // the rows before are done with
    // A warp brings rows of its own, kDim / 8 lanes each; loads are under way for four rows at a time.
    constexpr int kPieces = kDim / 8, kTogether = 32 / kPieces, kAhead = 4;
    const int piece = thread % kPieces, chunk = piece % 8 / 4 * 4;
    for (int first = warp * kTogether; first < padded; first += kWgmmaThreads / 32 * kTogether * kAhead) {
      uint4 words[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int row = first + i * (kWgmmaThreads / 32 * kTogether) + thread % 32 / kPieces;
        words[i] = make_uint4(0, 0, 0, 0);
        if (row < num_rows) {
          words[i] =
              load_once(reinterpret_cast<const uint4*>(query_of<T>(p, task, first_row + row) + piece * 8));
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int row = first + i * (kWgmmaThreads / 32 * kTogether) + thread % 32 / kPieces;
        if (row >= padded) continue;
        const uint32_t four[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
        char* const panel = memory + piece / 8 * panel_bytes + row * kPanelBytes;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          *reinterpret_cast<uint32_t*>(panel + ((chunk + j) ^ row % 8) * 16 + piece % 4 * 4) = four[j];
        }
      }
    }
    if constexpr (kSecond) {
      if (first_row == 0) wait_for_previous_kernels();
    }
    for (int i = thread; i < padded; i += kWgmmaThreads) {
      if constexpr (kSecond) {
        vectors[i] = i < num_rows ? log_sum(p, task, first_row + i) : INFINITY;
      } else {
        for (int w = 0; w < kWgmmaThreads / 32; ++w) {
          vectors[w * 2 * p.block_rows + i] = kNoTop;
          vectors[(w * 2 + 1) * p.block_rows + i] = 0.0f;
        }
      }
    }
    wgmma_fence_shared();
    int32_t token = task.first + warp * 16;
    KeyOperands<T, kDim, 2> keys;
    LoadedKeys<T, kDim, 2> next;
    next.load(p, task, token);
    __syncthreads();

    // Groups start their products in turn: else all would run at once, and then all exponentials. So they go
    // through equally many tiles, some of which may be past the end.
    const int32_t tiles =
        __shfl_sync(~0u, max(0, (task.end - task.first + kWgmmaTileTokens - 1) / kWgmmaTileTokens), 0);
    for (int32_t tile = 0; tile < tiles; ++tile, token += kWgmmaTileTokens) {
      if (rope) next.rotate(p, task, token);
      keys.take(next);
      next.load(p, task, token + kWgmmaTileTokens);
      const bool masked = token + 16 > seen_by_all(p, task);
      float shares[2] = {};

      for (int32_t row = 0; row < padded; row += kGroupRows) {
        Logits<kGroupRows / 8, 2> logits;
        const uint64_t low = wgmma_descriptor(base + row * kPanelBytes);
        const uint64_t high = low + (panel_bytes >> 4);  // addresses count in 16 bytes
        named_barrier_wait(1 + group, 2 * kGroupThreads);
        wgmma_arrive();
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
          wgmma_m64n64k16(reinterpret_cast<float (&)[32]>(logits.of), keys.operands[step / 2][step % 2][0],
                          step < 4 ? low + 2 * step : high + 2 * (step - 4), step > 0, TypeTag<T>{});
          if (step == kDim / 16 - 3) wgmma_commit();
        }
        wgmma_commit();
        wgmma_wait<1>();  // two products before the end: the next group needs as long to get going
        named_barrier_arrive(1 + (group + 1) % kScoreGroups, 2 * kGroupThreads);
        wgmma_wait<0>();
        if (masked) logits.mask(p, task, token, first_row + row);
        if constexpr (kSecond) {
          add_shares(logits, vectors + row, p.scale, shares);
        } else {
          add_to_sums(logits, tops + row, sums + row, p.scale);
        }
      }
      if constexpr (kSecond) write_shares(p, task, token, first_row == 0, shares);
    }
    if constexpr (!kSecond) {
      __syncthreads();
      for (int i = thread; i < num_rows; i += kWgmmaThreads) {
        float2 all = {kNoTop, 0.0f};
        for (int w = 0; w < kWgmmaThreads / 32; ++w) {
          const float* of = vectors + w * 2 * p.block_rows + i;
          all = merged(all, {of[0], of[p.block_rows]});
        }
        task.partials(p)[first_row + i] = all;
      }
    }
  }
  if constexpr (kSecond) clear_past_end(p, task);
#endif
}

}  // namespace livevlm
