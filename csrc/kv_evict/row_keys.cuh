// SPDX-License-Identifier: Apache-2.0
// The keys of a row's tokens, as one thread block holds them: larger for a better score.
//
// A warp has a contiguous stretch of the row, in words of 32 tokens, one a lane. So numbering tokens in order
// takes one sum over warps. Keys are made once and stay in shared memory; those of rows that do not fit are
// made again in each pass.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda_launch.cuh"
#include "common/ptx.cuh"

namespace livevlm {

inline constexpr int kRowThreads = 1024, kRowWarps = kRowThreads / 32;

inline constexpr uint32_t kNeverKey = 0;             // -inf and NaN
inline constexpr uint32_t kAlwaysKey = 0xff800000u;  // +inf, the largest

// Larger for a larger score.
__device__ __forceinline__ uint32_t score_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0.0 becomes 0.0
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return score > -INFINITY ? key : kNeverKey;
}

__device__ __forceinline__ int row_lane() {
  return static_cast<int>(threadIdx.x) % 32;
}

__device__ __forceinline__ int row_warp() {
  return static_cast<int>(threadIdx.x) / 32;
}

// The words of a row that are this warp's.
struct RowStretch {
  uint32_t first, count;
};

__device__ __forceinline__ RowStretch row_stretch(int32_t length) {
  const uint32_t words = (static_cast<uint32_t>(length) + 31) / 32;
  const uint32_t share = (words + kRowWarps - 1) / kRowWarps;
  const uint32_t first = min(static_cast<uint32_t>(row_warp()) * share, words);
  return {first, min(share, words - first)};
}

// kStaged: keys are kept in shared memory. A thread reads only what it wrote itself.
template <bool kStaged, typename KeyOf>
class RowKeys {
 public:
  // key_of(token) is asked for tokens below `length` only; others have kNeverKey. `staged`:
  // staged_bytes(length) of shared memory. If the block has only a part of the row, that is [begin, length);
  // `begin` is a multiple of 32.
  __device__ __forceinline__ RowKeys(int32_t length, KeyOf key_of, uint32_t* staged, int32_t begin = 0)
      : length_(length), key_of_(key_of), staged_(staged), own_(row_stretch(length - begin)) {
    own_.first += static_cast<uint32_t>(begin) / 32;
    if (kStaged) stage();
  }

  __device__ __forceinline__ int32_t token(uint32_t j) const {
    return static_cast<int32_t>((own_.first + j) * 32 + static_cast<uint32_t>(row_lane()));
  }

  // Calls f(token, key, j) with j = 0, 1, ...; the lanes of a warp come together.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    in_groups<kStaged ? 6 : 8>([](int32_t) { return 0; },
                               [&](int32_t token, uint32_t key, uint32_t j, int) { f(token, key, j); });
  }

  // Calls f(token, key, j, load(token)), after loading for kAhead words.
  template <int kAhead, typename Load, typename F>
  __device__ __forceinline__ void each_with(Load load, F f) const {
    in_groups<kAhead>(load, f);
  }

 private:
  static constexpr int kStageAhead = 18;

  __device__ __forceinline__ void stage() {
    for (uint32_t first = 0; first < own_.count; first += kStageAhead) {
      uint32_t keys[kStageAhead];
#pragma unroll
      for (int i = 0; i < kStageAhead; ++i) keys[i] = read(first + i);
#pragma unroll
      for (int i = 0; i < kStageAhead; ++i) {
        if (first + i < own_.count) staged_[place(first + i)] = keys[i];
      }
    }
  }

  // Words are loaded by groups, the last before the first is used.
  template <int kAhead, typename Load, typename F>
  __device__ __forceinline__ void in_groups(Load load, F f) const {
    for (uint32_t first = 0; first < own_.count; first += kAhead) {
      uint32_t keys[kAhead];
      decltype(load(0)) loaded[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        keys[i] = !kStaged ? read(first + i) : first + i < own_.count ? staged_[place(first + i)] : kNeverKey;
        loaded[i] = load(token(first + i));
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i < own_.count) f(token(first + i), keys[i], first + i, loaded[i]);
      }
    }
  }

  __device__ __forceinline__ uint32_t read(uint32_t j) const {
    return j < own_.count && token(j) < length_ ? key_of_(token(j)) : kNeverKey;
  }

  __device__ __forceinline__ static uint32_t place(uint32_t j) { return j * kRowThreads + threadIdx.x; }

  int32_t length_;
  KeyOf key_of_;
  uint32_t* staged_;
  RowStretch own_;
};

// One bit for each token of a thread, to be set once, by all lanes of a warp. In a register, or in scratch
// memory: there only the warp that writes a word reads it.
template <bool kStaged>
class RowFlags {
 public:
  __device__ __forceinline__ RowFlags(int32_t length, uint32_t* words)
      : words_(kStaged ? nullptr : words + row_stretch(length).first) {}

  __device__ __forceinline__ void set(uint32_t j, bool flag) {
    if (kStaged) {
      bits_ |= static_cast<uint32_t>(flag) << j;
    } else {
      const uint32_t votes = __ballot_sync(~0u, flag);
      if (row_lane() == 0) words_[j] = votes;
      __syncwarp();
    }
  }

  __device__ __forceinline__ bool operator[](uint32_t j) const {
    return ((kStaged ? bits_ >> j : words_[j] >> row_lane()) & 1) != 0;
  }

 private:
  uint32_t* words_;
  uint32_t bits_ = 0;
};

inline constexpr int64_t kMaxStagedWords = 32;  // of a warp: bits of a register

// Bytes of shared memory that staged keys of a row take.
inline int64_t staged_bytes(int64_t seq_len) {
  return ceil_div(seq_len, kRowThreads) * kRowThreads * static_cast<int64_t>(sizeof(uint32_t));
}

// Whether staged keys have room beside `shared_bytes` of shared memory.
inline bool fits_staged(int64_t seq_len, int64_t shared_bytes) {
  return seq_len <= kMaxStagedWords * kRowThreads &&
         shared_bytes + staged_bytes(seq_len) <= max_shared_bytes();
}

// Calls body(BoolTag<kStaged>{}, all bytes of shared memory): staged if there is room.
template <typename Body>
void dispatch_staged(int64_t seq_len, int64_t shared_bytes, Body body) {
  return fits_staged(seq_len, shared_bytes) ? body(BoolTag<true>{}, shared_bytes + staged_bytes(seq_len))
                                            : body(BoolTag<false>{}, shared_bytes);
}

}  // namespace livevlm
