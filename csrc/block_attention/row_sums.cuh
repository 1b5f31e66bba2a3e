// SPDX-License-Identifier: Apache-2.0
// Softmax and result of eight rows over some of the keys of a warp, in registers; products of tensor cores.
#pragma once

#include "block_attention/join_found.cuh"

namespace livevlm {

// A running sum of exponentials is relative to a top, raised when an exponential outgrows this.
inline constexpr float kRaiseAbove = 256.0f;

// logits += keys * queries; of the thread's keys lane / 4 and lane / 4 + 8, and row lane / 4, pieces of 8
// elements, 32 apart. Element j of the logits: key lane / 4 + j / 2 * 8, row lane % 4 * 2 + j % 2.
template <typename T, int kDim>
__device__ __forceinline__ void multiply(const uint4 (&upper)[kDim / 32], const uint4 (&lower)[kDim / 32],
                                         const uint4 (&query)[kDim / 32], float (&logits)[4]) {
  float other[4] = {};  // two sums, so that half as many products wait for each other
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const uint4 u = upper[i], l = lower[i], q = query[i];
    const uint32_t a[4] = {u.x, l.x, u.y, l.y}, b[2] = {q.x, q.y};
    mma_m16n8k16(logits, a, b, TypeTag<T>{});
    const uint32_t c[4] = {u.z, l.z, u.w, l.w}, d[2] = {q.z, q.w};
    mma_m16n8k16(other, c, d, TypeTag<T>{});
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) logits[j] += other[j];
}

// Hides keys from rows. `seen`: of the thread's two rows.
__device__ __forceinline__ void hide(float (&logits)[4], const Range (&seen)[2], int32_t first_key,
                                     uint32_t present) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int which = static_cast<int>(threadIdx.x) % 32 / 4 + j / 2 * 8;
    const int32_t key = first_key + which;
    if (!(present >> which & 1) || key < seen[j % 2].begin || key >= seen[j % 2].end) logits[j] = -INFINITY;
  }
}

// Values that are multiplied as codes: `out` is a power of two times what it should be, and there may be
// something to be added to all dimensions of a row.
enum class CodeSums { kNone, kPower, kPowerAndOffset };

template <typename T, int kDim, CodeSums kCodes = CodeSums::kNone>
struct RowSums {
  static constexpr int kHalves = kDim / 64;
  float out[kHalves][4][4] = {};  // dimensions lane / 4 * 8 + 2 m + j / 2, row lane % 4 * 2 + j % 2
  float top[2] = {kNoTop, kNoTop}, sum[2] = {};  // before add_lanes(), `sum` is of this thread's keys only
  float offset[2] = {}, power = 0x1p127f;        // see CodeSums; `offset` is of this thread's keys, too

  // Exponentials of scaled logits, in their place; those are -inf where a row does not see a key.
  __device__ __forceinline__ void exponentials(float (&logits)[4]) {
    float weights[4];
    const auto weigh = [&] {
#pragma unroll
      for (int j = 0; j < 4; ++j) weights[j] = exp2_approx(logits[j] - top[j % 2]);
    };
    weigh();
    const float most = fmaxf(fmaxf(weights[0], weights[1]), fmaxf(weights[2], weights[3]));
    if (__any_sync(~0u, most > kRaiseAbove)) {  // also for the first keys
      raise(logits);
      weigh();
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[j] = weights[j];
    sum[0] += weights[0] + weights[2];
    sum[1] += weights[1] + weights[3];
  }

  __device__ __forceinline__ void raise(const float (&logits)[4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float largest = fmaxf(fmaxf(logits[j], logits[j + 2]), top[j]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      const float shrink = exp2_approx(top[j] - largest);
      top[j] = largest;
      sum[j] *= shrink;
      if constexpr (kCodes == CodeSums::kPowerAndOffset) offset[j] *= shrink;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int m = 0; m < 4; ++m) out[half][m][j] *= shrink, out[half][m][j + 2] *= shrink;
      }
    }
  }

  // out += V^T * P^T. Rows of V^T: dimensions 2 m and, eight rows below, 2 m + 1 of the thread's; columns:
  // keys.
  template <typename Ring>
  __device__ __forceinline__ void add(const float (&weights)[4], const Ring& ring, int step) {
    const uint32_t b[2] = {transpose_8x8(narrow_pair(weights[0], weights[1], TypeTag<T>{})),
                           transpose_8x8(narrow_pair(weights[2], weights[3], TypeTag<T>{}))};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      uint4 words[4];
      ring.values(step, half, words);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const auto word = [&](int i) {
          return m == 0 ? words[i].x : m == 1 ? words[i].y : m == 2 ? words[i].z : words[i].w;
        };
        const uint32_t a[4] = {__byte_perm(word(0), word(1), 0x5410), __byte_perm(word(0), word(1), 0x7632),
                               __byte_perm(word(2), word(3), 0x5410), __byte_perm(word(2), word(3), 0x7632)};
        mma_m16n8k16(out[half][m], a, b, TypeTag<T>{});
      }
    }
  }

  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum[j] += __shfl_xor_sync(~0u, sum[j], step);
      if constexpr (kCodes != CodeSums::kNone) finish_codes(j);
    }
  }

  __device__ __forceinline__ void finish_codes(int j) {
    if constexpr (kCodes == CodeSums::kPowerAndOffset) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) offset[j] += __shfl_xor_sync(~0u, offset[j], step);
    }
    const float inverse = 1.0f / power;
#pragma unroll
    for (int i = j; i < kHalves * 16; i += 2) {
      float& own = out[i / 16][i / 4 % 4][i % 4];
      own = fmaf(own, inverse, offset[j]);
    }
  }

  // What was found before, kept in the warp's own shared memory: RowSums::kKept floats a lane, 32 apart.
  static constexpr int kKept = kHalves * 16 + 4;

  __device__ __forceinline__ void keep(float* kept) const {
    kept += threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kHalves * 16; ++i) kept[i * 32] = out[i / 16][i / 4 % 4][i % 4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      kept[(kHalves * 16 + j) * 32] = top[j], kept[(kHalves * 16 + 2 + j) * 32] = sum[j];
    }
  }

  // Merges it with what came after it, as combine_splits_kernel does.
  __device__ __forceinline__ void merge_with(const float* kept) {
    kept += threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const MergeFactors factors(kept[(kHalves * 16 + j) * 32], top[j]);
      top[j] = factors.top;
      sum[j] = factors.merged(kept[(kHalves * 16 + 2 + j) * 32], sum[j]);
#pragma unroll
      for (int i = j; i < kHalves * 16; i += 2) {
        float& own = out[i / 16][i / 4 % 4][i % 4];
        own = factors.merged(kept[i * 32], own);
      }
    }
  }

  __device__ __forceinline__ void write(const AttentionKernel& p, const RowTile& tile, int64_t head,
                                        int32_t found) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t row = lane % 4 * 2 + j;
      if (row >= tile.num_rows) continue;
      const int64_t at = found_at(p, tile.sequence, head, tile.first_row + row, found);
      float* const target = p.found_out + at * kDim + lane / 4 * 8;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        store(target + half * 64,
              {out[half][0][j], out[half][0][j + 2], out[half][1][j], out[half][1][j + 2]});
        store(target + half * 64 + 4,
              {out[half][2][j], out[half][2][j + 2], out[half][3][j], out[half][3][j + 2]});
      }
      if (lane < 4) p.found_sums[at] = make_float2(top[j], sum[j]);
    }
  }
};

}  // namespace livevlm
