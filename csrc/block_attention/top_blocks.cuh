// SPDX-License-Identifier: Apache-2.0
// From scores to a block table: rows of few blocks by one thread block each, others by a cluster.
#pragma once

#include "block_attention/few_blocks.cuh"
#include "block_attention/many_blocks.cuh"

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

// A row of scores that was not yet made into keys.
struct ScoreRow {
  int64_t row;
  int32_t blocks, sinks, recent;
  const float* scores;
  int32_t heads, stride;  // that are added up, and how far apart they are
  bool poisoned = false;  // no block has a score

  __device__ __forceinline__ ScoreRow(const RetrieveKernel& p, int64_t row)
      : row(row),
        blocks(valid_blocks(p.op, batch_of(p.op, row))),
        sinks(static_cast<int32_t>(min(p.op.num_sink_blocks, int64_t{blocks}))),
        recent(static_cast<int32_t>(max(blocks - p.op.num_recent_blocks, int64_t{0}))),
        scores(p.scores + row * p.added_heads * p.num_blocks),
        heads(p.added_heads),
        stride(p.num_blocks) {}

  __device__ __forceinline__ float score(int32_t block) const {
    return sum_of(0, 1, heads, [&](int64_t head) { return __ldcg(scores + head * stride + block); });
  }

  __device__ __forceinline__ uint32_t key(int32_t block, float score) const {
    const uint32_t key = poisoned ? kNeverKey : score_key(score);
    return (block < sinks) | (block >= recent) ? kAlwaysKey : key;
  }
};

// Keys in registers: those of blocks thread, thread + kThreads, ... Scores of kHeads heads at a time are all
// on their way together.
template <int kThreads, int kWords, int kHeads>
class HeldKeys {
 public:
  __device__ __forceinline__ HeldKeys(ScoreRow& row, bool can_be_poisoned) : blocks_(row.blocks) {
    float sums[kWords] = {};
    const float* scores = row.scores;
    for (int32_t first = 0; first < row.heads; first += kHeads) {
      float loaded[kHeads][kWords];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int j = 0; j < kWords; ++j) {
          loaded[h][j] = 0.0f;
          if (first + h < row.heads && block(j) < blocks_) loaded[h][j] = __ldcg(scores + block(j));
        }
        scores += row.stride;
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int j = 0; j < kWords; ++j) sums[j] += loaded[h][j];
      }
    }
    if (can_be_poisoned) {
      bool any = false;
#pragma unroll
      for (int j = 0; j < kWords; ++j) any |= score_is_nan(sums[j]);
      row.poisoned = __syncthreads_or(any) != 0;
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) keys_[j] = block(j) < blocks_ ? row.key(block(j), sums[j]) : kNeverKey;
  }

  // Calls f(block, key) for whole words of 32 blocks; those past the last one have no key.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if (block(j) - row_lane() < blocks_) f(block(j), keys_[j]);
    }
  }

 private:
  __device__ __forceinline__ static int32_t block(int j) {
    return j * kThreads + static_cast<int32_t>(threadIdx.x);
  }

  int32_t blocks_;
  uint32_t keys_[kWords];
};

// Rows of few blocks: see few_blocks.cuh.
template <int kThreads, int kWords, int kHeads>
__global__ void __launch_bounds__(kThreads, 1)
    pick_few_blocks_kernel(const __grid_constant__ RetrieveKernel p) {
  LIVEVLM_DYNAMIC_SHARED(PickShared, memory);
  let_next_kernel_start();
  ScoreRow row(p, blockIdx.x);
  Picker<kThreads> picker(memory, row.blocks);
  const auto width = static_cast<uint32_t>(table_width(p.op, row.blocks));
  wait_for_previous_kernels();
  __syncthreads();
  // score_tokens gives NaN to the tokens that made a softmax NaN, and zero to all others.
  const bool can_be_poisoned = p.op.kind == BlockScore::kMass;
  picker.pick(HeldKeys<kThreads, kWords, kHeads>(row, can_be_poisoned), width);
  picker.write(p.op.block_table + row.row * p.op.num_selected, p.op.num_selected, p.op.counts + row.row);
}

// Finds the best blocks of a row and writes them; see find_cut.
template <typename KeyOf>
__device__ __forceinline__ void pick_row(const RetrieveKernel& p, const ScoreRow& row, ClusterShared& shared,
                                         const RowPart& own, KeyOf key_of) {
  const auto width = static_cast<uint32_t>(table_width(p.op, row.blocks));
  const KeyCut cut = find_cut(shared, own, key_of, width);
  write_picked(shared, own, key_of, cut, p.op.block_table + row.row * p.op.num_selected, p.op.num_selected,
               p.op.counts + row.row);
}

// Rows of many blocks: see many_blocks.cuh. Keys are kept in shared memory; if not kStaged, which is for rows
// too long, they are made again each time.
template <bool kStaged>
__global__ void __launch_bounds__(kManyThreads, 1)
    pick_many_blocks_kernel(const __grid_constant__ RetrieveKernel p) {
  LIVEVLM_DYNAMIC_SHARED(ClusterShared, memory);
  ClusterShared& shared = *memory;
  auto* const staged = reinterpret_cast<uint32_t*>(memory + 1);
  ScoreRow row(p, blockIdx.x / static_cast<uint32_t>(p.cluster_size));
  const RowPart own(row.blocks, p.cluster_size);
  clear(shared, own.size);
  let_next_kernel_start();
  wait_for_previous_kernels();
  const auto make_key = [&](int32_t i) { return row.key(own.first + i, row.score(own.first + i)); };
  if (row_warp() == 0) cluster_wait();  // all blocks have started
  __syncthreads();
  // score_tokens gives NaN to the tokens that made a softmax NaN, and zero to all others.
  if (p.op.kind == BlockScore::kMass) {
    bool any = false;
    for (auto i = static_cast<int32_t>(threadIdx.x); i < own.count; i += kManyThreads)
      any |= score_is_nan(row.score(own.first + i));
    any = __syncthreads_or(any) != 0;
    if (threadIdx.x < own.size) {
      announce_mail(threadIdx.x, &shared.poison_box, 1);
      send_to_add(threadIdx.x, &shared.poison_box, &shared.ranks_poisoned, any ? 1 : 0);
    }
    wait_for_mail(&shared.poison_box);
    row.poisoned = shared.ranks_poisoned != 0;
  }
  if constexpr (!kStaged) {
    pick_row(p, row, shared, own, make_key);
  } else {
    each_key(static_cast<int32_t>(threadIdx.x), kManyThreads, own.count, make_key,
             [&](int32_t i, uint32_t key) {
               if (i < own.count) staged[i] = key;
             });
    __syncthreads();
    pick_row(p, row, shared, own, [&](int32_t i) { return staged[i]; });
  }
}

}  // namespace livevlm
