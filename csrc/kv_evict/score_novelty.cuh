// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of `score_novelty`.
//
// A row of means is twice as wide as a row of 16-bit tokens, and would be read anew for every token. So a
// block has a few patch slots of one sequence. It finds their tokens, in order, and goes through them: the
// slots' means, and the earlier tokens that it has just read, are in L1. It costs more than it saves: see the
// docs.
#pragma once

#include "common/block_scan.cuh"
#include "common/cuda_launch.cuh"
#include "kv_evict/recent_patches.cuh"
#include "kv_evict/score_novelty.h"

namespace livevlm {

inline constexpr int kNoveltyThreads = 128;
inline constexpr int kScanned = 32 * kNoveltyThreads;  // tokens that are looked at before some are compared
inline constexpr int kCompared = 2;                    // tokens that a group of lanes compares at once

struct NoveltyKernel {
  ScoreNovelty op;
  uint32_t groups, slots_per_group;  // of patch slots; each is a block's
  uint32_t splits;                   // of a sequence, if there are too few groups
  int64_t tokens_per_split;
};

// What a block has to do: the tokens [first, end) whose slots are in [first_slot, first_slot + num_slots),
// and of those without a slot every `groups`th.
struct NoveltyShare {
  int64_t batch, first, end, length;
  uint32_t group, first_slot, num_slots;

  __device__ __forceinline__ explicit NoveltyShare(const NoveltyKernel& p) {
    group = blockIdx.x % p.groups;
    const uint32_t split = blockIdx.x / p.groups % p.splits;
    batch = blockIdx.x / p.groups / p.splits;
    first = split * p.tokens_per_split;
    end = min(first + p.tokens_per_split, p.op.seq_len);
    length = p.op.seq_lens ? min(int64_t{p.op.seq_lens[batch]}, p.op.seq_len) : p.op.seq_len;
    first_slot = group * p.slots_per_group;
    num_slots = min(p.slots_per_group, static_cast<uint32_t>(p.op.tokens_per_frame) - first_slot);
  }

  __device__ __forceinline__ bool has(const NoveltyKernel& p, const int32_t* slots, int64_t token) const {
    if (token >= end) return false;
    const auto slot = static_cast<uint32_t>(token < length ? slots[token] : -1);  // a negative one is large
    if (slot < p.op.tokens_per_frame) return slot - first_slot < num_slots;
    return static_cast<uint32_t>(token) % p.groups == group;
  }
};

// Lists the block's tokens among the kScanned from `start` on, in order; returns how many. The list may still
// be in use by other threads: none writes to it before all have come to the scan.
__device__ __forceinline__ uint32_t find_tokens(const NoveltyKernel& p, const NoveltyShare& share,
                                                int64_t start, int32_t* list) {
  const int32_t* slots = p.op.slots + share.batch * p.op.seq_len;
  const uint32_t lane = threadIdx.x % 32;
  const int64_t of_warp = start + int64_t{threadIdx.x / 32} * 32 * 32;
  uint32_t mask = 0;  // of the 32 tokens that this thread writes down
#pragma unroll 8
  for (uint32_t round = 0; round < 32; ++round) {
    const uint32_t found = __ballot_sync(~0u, share.has(p, slots, of_warp + round * 32 + lane));
    if (round == lane) mask = found;
  }
  const Scan scan = block_scan<kNoveltyThreads>(static_cast<uint32_t>(__popc(mask)));
  int32_t* target = list + scan.before;
  for (; mask; mask &= mask - 1) {
    const int bit = __popc((mask & -mask) - 1);
    *target++ = static_cast<int32_t>(of_warp + lane * 32 + bit);
  }
  __syncthreads();
  return scan.total;
}

// A token, and what it is compared with; -1 for what there is not.
struct Comparison {
  int32_t token = -1, slot = -1, previous = -1;

  __device__ __forceinline__ Comparison(const NoveltyKernel& p, const NoveltyShare& share,
                                        const int32_t* list, uint32_t place, uint32_t count) {
    if (place >= count) return;
    token = list[place];
    if (token >= share.length) return;
    const int64_t at = share.batch * p.op.seq_len + token;
    const int32_t given_slot = p.op.slots[at], given_previous = p.op.previous[at];
    if (given_slot >= 0 && given_slot < p.op.tokens_per_frame) slot = given_slot;
    if (given_previous >= 0 && given_previous < share.length) previous = given_previous;
  }
};

// Compares tokens, by the lanes of a group, and writes the distances.
template <typename T, int kSize, int kLanes>
__device__ __forceinline__ void compare_tokens(const NoveltyKernel& p, const NoveltyShare& share,
                                               const Comparison (&tokens)[kCompared]) {
  const ScoreNovelty& op = p.op;
  const auto row_of = [&](const Tokens& rows, int32_t row, auto type) {
    return static_cast<const typename decltype(type)::type*>(rows.data) + share.batch * rows.stride_batch +
           max(row, 0) * rows.stride_token;
  };
  const T *own_row[kCompared], *previous_row[kCompared];
  const float* usual_row[kCompared];
  float change[kCompared] = {}, step[kCompared] = {};
#pragma unroll
  for (int i = 0; i < kCompared; ++i) {
    own_row[i] = row_of(op.x, tokens[i].token, TypeTag<T>{});
    previous_row[i] = row_of(op.x, tokens[i].previous, TypeTag<T>{});
    usual_row[i] = row_of(op.usual, tokens[i].slot, TypeTag<float>{});
  }
  const uint32_t lane = threadIdx.x % kLanes, of_head = static_cast<uint32_t>(op.head_dim) / kSize;
  const uint32_t pieces = static_cast<uint32_t>(op.num_heads) * of_head;
#pragma unroll 1
  for (uint32_t piece = lane; piece < pieces; piece += kLanes) {
    const int64_t head = piece / of_head, dim = piece % of_head * kSize;
    const int64_t in_x = head * op.x.stride_head + dim * op.x.stride_dim;
    const int64_t in_usual = head * op.usual.stride_head + dim * op.usual.stride_dim;
    Patch<T, kSize> own[kCompared], previous[kCompared];
    Patch<float, kSize> usual[kCompared];
#pragma unroll
    for (int i = 0; i < kCompared; ++i) {  // all loads before the first is used
      own[i] = {}, previous[i] = {}, usual[i] = {};
      if (tokens[i].slot >= 0 || tokens[i].previous >= 0) own[i].load(own_row[i] + in_x);
      if (tokens[i].slot >= 0) usual[i].load(usual_row[i] + in_usual);
      if (tokens[i].previous >= 0) previous[i].load(previous_row[i] + in_x);
    }
#pragma unroll
    for (int i = 0; i < kCompared; ++i) {
      float x[kSize], other[kSize];
      own[i].widen(x);
      usual[i].widen(other);
#pragma unroll
      for (int j = 0; j < kSize; ++j) change[i] += (x[j] - other[j]) * (x[j] - other[j]);
      previous[i].widen(other);
#pragma unroll
      for (int j = 0; j < kSize; ++j) step[i] += (x[j] - other[j]) * (x[j] - other[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kCompared; ++i) {
    change[i] = sqrtf(sum_of_lanes<kLanes>(change[i]));
    step[i] = sqrtf(sum_of_lanes<kLanes>(step[i]));
    if (lane != 0 || tokens[i].token < 0) continue;
    const int64_t at = share.batch * op.seq_len + tokens[i].token;
    const float none = tokens[i].token < share.length ? INFINITY : 0.0f;
    op.change[at] = tokens[i].slot >= 0 ? change[i] : none;
    op.step[at] = tokens[i].previous >= 0 ? step[i] : none;
  }
}

template <typename T, int kSize, int kLanes>
__global__ void __launch_bounds__(kNoveltyThreads, 6)
    score_novelty_kernel(const __grid_constant__ NoveltyKernel p) {
  __shared__ int32_t list[kScanned];
  constexpr uint32_t kStep = kNoveltyThreads / kLanes * kCompared;
  static_assert(kCompared == 2, "tokens are named one by one");
  const NoveltyShare share(p);
  for (int64_t start = share.first; start < share.end; start += kScanned) {
    const uint32_t count = find_tokens(p, share, start, list);
    const auto tokens_at = [&](uint32_t place) { return Comparison(p, share, list, place, count); };
    uint32_t place = threadIdx.x / kLanes * kCompared;
    Comparison next[kCompared] = {tokens_at(place), tokens_at(place + 1)};
    // Groups without a token go along: a warp's lanes meet in shuffles.
#pragma unroll 1
    for (uint32_t done = 0; done < count; done += kStep) {
      const Comparison now[kCompared] = {next[0], next[1]};
      place += kStep;  // ahead: which rows are read depends on it
      next[0] = tokens_at(place), next[1] = tokens_at(place + 1);
      compare_tokens<T, kSize, kLanes>(p, share, now);
    }
  }
}

}  // namespace livevlm
