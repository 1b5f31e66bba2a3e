// SPDX-License-Identifier: Apache-2.0
// Logits as tensor cores give them, and the running sums of their exponentials, for `score_tokens`.
#pragma once

#include "kv_evict/score_tokens.cuh"

namespace livevlm {

// Logits before scaling: of kEights times eight rows, and kKeys keys a thread. Fragment element j of a thread
// is key lane / 4 + j / 2 * 8 of 16, row lane % 4 * 2 + j % 2 of 8. What a thread has of its rows is numbered
// 2 * n + j % 2.
template <int kEights, int kKeys>
struct Logits {
  static constexpr int kTiles = kKeys / 2;  // of 16 keys
  static constexpr int kRows = 8 * kEights;
  float of[kEights][kTiles][4];

  // Hides keys from the rows that don't see them.
  __device__ __forceinline__ void mask(const ScoreKernel& p, const ScoreTask& task, int32_t first_token,
                                       int32_t row) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 4 * kEights * kTiles; ++i) {
      const int n = i / (4 * kTiles), m = i / 4 % kTiles, j = i % 4;
      const int32_t token = first_token + m * 16 + j / 2 * 8 + lane / 4;
      if (token >= task.seen(p, row + n * 8 + lane % 4 * 2 + j % 2)) of[n][m][j] = -INFINITY;
    }
  }

  __device__ __forceinline__ float largest(int value) const {
    const int n = value / 2, j = value % 2;
    float top = fmaxf(of[n][0][j], of[n][0][j + 2]);
    if constexpr (kTiles == 2) top = fmaxf(top, fmaxf(of[n][1][j], of[n][1][j + 2]));
    return top;
  }
};

// Adds over the eight lanes that share rows: from kStep = 16 down to 4. As long as a lane has several values,
// it gives half of them to its partner for the other half of the partner's: that takes fewer shuffles than
// adding all in all lanes. Returns the number of the value that values[0] is then.
template <int kCount, int kStep = 16, int kValues>
__device__ __forceinline__ int sum_over_keys(float (&values)[kValues]) {
  if constexpr (kStep < 4) {
    return 0;
  } else if constexpr (kCount == 1) {
    values[0] += __shfl_xor_sync(~0u, values[0], kStep);
    return sum_over_keys<1, kStep / 2>(values);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (threadIdx.x & kStep) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float give = upper ? values[i] : values[i + kHalf], keep = upper ? values[i + kHalf] : values[i];
      values[i] = keep + __shfl_xor_sync(~0u, give, kStep);
    }
    return (upper ? kHalf : 0) + sum_over_keys<kHalf, kStep / 2>(values);
  }
}

// The sums of a thread's keys for each of its rows, relative to `tops`.
template <int kEights, int kKeys>
__device__ __forceinline__ void exponentials(const Logits<kEights, kKeys>& logits, const float* tops,
                                             float scale, float (&values)[2 * kEights]) {
  const int own = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    const float2 top = *reinterpret_cast<const float2*>(tops + n * 8 + own);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float reference = j ? top.y : top.x;
      float sum = exp2_approx(fmaf(logits.of[n][0][j], scale, -reference)) +
                  exp2_approx(fmaf(logits.of[n][0][j + 2], scale, -reference));
      if constexpr (kKeys == 4) {
        sum += exp2_approx(fmaf(logits.of[n][1][j], scale, -reference)) +
               exp2_approx(fmaf(logits.of[n][1][j + 2], scale, -reference));
      }
      values[2 * n + j] = sum;
    }
  }
}

// Raises the rows' tops to their largest logits.
template <int kEights, int kKeys>
__device__ __forceinline__ void raise_tops(const Logits<kEights, kKeys>& logits, float* tops, float* sums,
                                           float scale) {
  const int lane = static_cast<int>(threadIdx.x) % 32, own = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * kEights; ++i) {
    float largest = logits.largest(i) * scale;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const int row = i / 2 * 8 + own + i % 2;
    if (lane < 4 && largest > tops[row]) {
      sums[row] *= exp2_approx(tops[row] - largest);
      tops[row] = largest;
    }
  }
  __syncwarp();
}

// Adds the warp's keys to the running sums of the rows; `tops` and `sums` are the warp's own, of these rows.
template <int kEights, int kKeys>
__device__ __forceinline__ void add_to_sums(const Logits<kEights, kKeys>& logits, float* tops, float* sums,
                                            float scale) {
  constexpr int kValues = 2 * kEights;
  const int lane = static_cast<int>(threadIdx.x) % 32, own = lane % 4 * 2;
  float values[kValues];
  exponentials(logits, tops, scale, values);
  float most = values[0];
#pragma unroll
  for (int i = 1; i < kValues; ++i) most = fmaxf(most, values[i]);
  if (__any_sync(~0u, most > kOutgrown)) {  // also for the first keys
    raise_tops(logits, tops, sums, scale);
    exponentials(logits, tops, scale, values);
  }
  const int first = sum_over_keys<kValues>(values);
  if constexpr (kValues == 16) {  // two rows a lane are left
    float2* two = reinterpret_cast<float2*>(sums + first * 4 + own);
    two->x += values[0], two->y += values[1];
  } else {  // one, the same in two lanes
    static_assert(kValues == 4, "16 or 64 rows");
    if ((lane & 4) == 0) sums[first / 2 * 8 + own + first % 2] += values[0];
  }
  __syncwarp();
}

// Adds what the thread's keys get from the rows; `logs`: the logarithms of the rows' sums.
template <int kEights, int kKeys>
__device__ __forceinline__ void add_shares(const Logits<kEights, kKeys>& logits, const float* logs,
                                           float scale, float (&shares)[kKeys]) {
  const int own = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    const float2 log = *reinterpret_cast<const float2*>(logs + n * 8 + own);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {  // key lane / 4 + 8 * i
      const float* two = &logits.of[n][i / 2][i % 2 * 2];
      shares[i] += exp2_approx(fmaf(two[0], scale, -log.x)) + exp2_approx(fmaf(two[1], scale, -log.y));
    }
  }
}

// Writes what the keys got in all: the lanes of a key each have the sum over some rows.
template <int kKeys>
__device__ __forceinline__ void write_shares(const ScoreKernel& p, const ScoreTask& task, int32_t first_token,
                                             bool first_rows, float (&shares)[kKeys]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    shares[i] += __shfl_xor_sync(~0u, shares[i], 1);
    shares[i] += __shfl_xor_sync(~0u, shares[i], 2);
    const int32_t token = first_token + i * 8 + lane / 4;
    if (lane % 4 != 0 || token >= task.end) continue;
    float* score = p.scores + task.batch_head * p.op.seq_len + token;
    const float share = shares[i] / static_cast<float>(p.num_rows);
    *score = first_rows ? share : *score + share;
  }
}

// Zeros for the keys of a split that do not exist.
__device__ __forceinline__ void clear_past_end(const ScoreKernel& p, const ScoreTask& task) {
  const auto stop = static_cast<int32_t>(min(int64_t{task.first} + p.split_tokens, p.op.seq_len));
  for (auto i = max(task.end, task.first) + static_cast<int32_t>(threadIdx.x); i < stop;
       i += static_cast<int32_t>(blockDim.x)) {
    p.scores[task.batch_head * p.op.seq_len + i] = 0.0f;
  }
}

// The first tokens of a sequence that all rows see.
__device__ __forceinline__ int32_t seen_by_all(const ScoreKernel& p, const ScoreTask& task) {
  return p.op.causal ? task.length - static_cast<int32_t>(p.op.num_queries) + 1 : task.length;
}

}  // namespace livevlm
