// SPDX-License-Identifier: Apache-2.0
// From scores to a block table: one thread block a row of scores.
#pragma once

#include "block_attention/retrieve_blocks.cuh"
#include "kv_evict/top_tokens.cuh"

namespace livevlm {

inline constexpr int kAddThreads = 256, kAddLanes = 8;  // that share a block

// Adds up the parts of each score, of heads and of a block's tokens, in a fixed order.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const __grid_constant__ RetrieveKernel p) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const RetrieveBlocks& op = p.op;
  const int64_t heads = op.per_head ? 1 : op.num_heads, rows = op.batch * (op.num_heads / heads);
  const int64_t number = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kAddLanes;
  const int64_t row = min(number / p.num_blocks, rows - 1), block = number - row * p.num_blocks;
  const int64_t batch = batch_of(op, row);
  // Parts of a softmax over blocks are not of tokens.
  const int64_t size = op.kind == BlockScore::kMass ? op.block_size : 1;
  const int64_t begin = block * size;
  const int64_t count = max(int64_t{0}, min(size, valid_entries(op, batch) - begin));
  const float* parts = p.parts + row * heads * p.part_count + begin;
  const auto width = static_cast<uint32_t>(max(count, int64_t{1}));
  float sum = sum_of(threadIdx.x % kAddLanes, kAddLanes, heads * count, [&](int64_t i) {
    const uint32_t head = static_cast<uint32_t>(i) / width;
    return parts[head * p.part_count + (i - int64_t{head} * width)];
  });
#pragma unroll
  for (int step = kAddLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % kAddLanes == 0 && block < p.num_blocks) p.scores[number] = sum;
}

// Keys of a row's blocks as `RowKeys` has them, in registers: kWords a thread. Scores of all of a thread's
// blocks are on their way at the same time.
template <int kWords>
class HeldKeys {
 public:
  // key_of(block, score) for blocks below `length`. The score is the sum of `count` rows, `stride` apart.
  template <typename KeyOf>
  __device__ __forceinline__ HeldKeys(int32_t length, const float* scores, int32_t count, int32_t stride,
                                      KeyOf key_of)
      : own_(row_stretch(length)) {
    float sums[kWords] = {};
    for (int32_t i = 0; i < count; ++i, scores += stride) {
      float loaded[kWords];
#pragma unroll
      for (uint32_t j = 0; j < kWords; ++j)
        loaded[j] = j < own_.count && token(j) < length ? __ldcg(scores + token(j)) : 0.0f;
#pragma unroll
      for (uint32_t j = 0; j < kWords; ++j) sums[j] += loaded[j];
    }
#pragma unroll
    for (uint32_t j = 0; j < kWords; ++j)
      keys_[j] = j < own_.count && token(j) < length ? key_of(token(j), sums[j]) : kNeverKey;
  }

  __device__ __forceinline__ int32_t token(uint32_t j) const {
    return static_cast<int32_t>((own_.first + j) * 32 + static_cast<uint32_t>(row_lane()));
  }

  template <typename F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (uint32_t j = 0; j < kWords; ++j) {
      if (j < own_.count) f(token(j), keys_[j], j);
    }
  }

 private:
  RowStretch own_;
  uint32_t keys_[kWords];
};

__device__ __forceinline__ bool score_is_nan(float score) {
  return !(score == score);
}

// How many blocks to select, if there are so many with a score.
__device__ __forceinline__ int64_t table_width(const RetrieveBlocks& op, int32_t blocks) {
  const int64_t width = min(int64_t{blocks}, op.num_selected);
  if (op.ratio > 1.0) return width;
  // 1e-6 keeps 0.07 * 100 = 7.000000000000001 at 7 blocks.
  const auto share = static_cast<int64_t>(ceil(blocks * op.ratio - 1e-6));
  return min(width, max(share, op.num_sink_blocks + op.num_recent_blocks));
}

template <typename Keys>
__device__ __forceinline__ void write_table(const RetrieveBlocks& op, int64_t row, int32_t blocks,
                                            const Keys& keys, TopShared& shared) {
  const auto width = static_cast<uint32_t>(table_width(op, blocks));
  const Cut cut =
      find_cut(keys, width, false, width, shared, [](int32_t, uint32_t key, auto) { return key; });
  const int32_t count = write_indices(
      keys, op.num_selected, op.block_table + row * op.num_selected, shared,
      [&](int32_t block, uint32_t key, auto) { return key != kNeverKey && cut.takes(key, block); });
  if (threadIdx.x == 0) op.counts[row] = count;
}

// kWords: as many words of 32 blocks a warp has in registers; 0: keys are in shared memory, -1: made again in
// each pass.
template <int kWords>
__global__ void __launch_bounds__(kRowThreads, 1)
    top_blocks_kernel(const __grid_constant__ RetrieveKernel p) {
  LIVEVLM_DYNAMIC_SHARED(TopShared, top);  // and staged keys behind it
  TopShared& shared = *top;
  const RetrieveBlocks& op = p.op;
  const int64_t row = blockIdx.x;
  const int32_t blocks = valid_blocks(op, batch_of(op, row));
  const auto sinks = static_cast<int32_t>(min(op.num_sink_blocks, int64_t{blocks}));
  const auto recent = static_cast<int32_t>(max(blocks - op.num_recent_blocks, int64_t{0}));
  const float* scores = p.scores + row * p.added_heads * p.num_blocks;
  wait_for_previous_kernels();

  bool poisoned = false;
  if (op.kind == BlockScore::kMass) {
    // score_tokens gives NaN to the tokens that made a softmax NaN, and zero to all others.
    bool any = false;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < blocks; i += kRowThreads)
      any |= score_is_nan(__ldcg(scores + i));
    poisoned = __syncthreads_or(any) != 0;
  }
  const auto key_of = [&](int32_t block, float score) {
    const uint32_t key = poisoned ? kNeverKey : score_key(score);
    return (block < sinks) | (block >= recent) ? kAlwaysKey : key;
  };
  if constexpr (kWords > 0) {
    const HeldKeys<kWords> keys(blocks, scores, p.added_heads, p.num_blocks, key_of);
    write_table(op, row, blocks, keys, shared);
  } else {
    const auto read_key = [&](int32_t block) { return key_of(block, __ldcg(scores + block)); };
    const RowKeys<kWords == 0, decltype(read_key)> keys(blocks, read_key,
                                                        reinterpret_cast<uint32_t*>(&shared + 1));
    write_table(op, row, blocks, keys, shared);
  }
}

}  // namespace livevlm
