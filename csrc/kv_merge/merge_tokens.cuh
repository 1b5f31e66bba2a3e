// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of `merge_tokens`: the means, once it is known which token goes where.
//
// A thread sums one vector of one row of the result, keys or values, over tokens of that row. With few rows,
// and so many tokens in each, a block finds its row's tokens by going through all groups, which is cheap and
// saves kernels; several threads share a vector then, each with its own part of the tokens. With many rows
// the tokens are sorted by group first (order_by_group.cuh), and a thread has a vector to itself. How sums
// are split depends on nothing but the row's tokens.
#pragma once

#include "common/cuda_vec.cuh"
#include "kv_merge/merge_tokens.h"

namespace livevlm {

struct MergeKernel {
  MergeTokens op;
  const int32_t* order;   // [batch, seq_len]: tokens by group, and
  const int32_t* starts;  // [batch, num_groups + 1] where each group starts; null: not sorted
  uint32_t column_blocks, group_blocks;
};

__device__ __forceinline__ float weight_of(const MergeTokens& op, int64_t batch, int32_t token) {
  const int64_t at = batch * op.seq_len + token;
  return (op.sizes ? op.sizes[at] : 1.0f) * (op.weights ? op.weights[at] : 1.0f);
}

// Columns are those of the keys, then those of the values, kSize elements each.
template <typename T, int kSize>
struct MergeColumn {
  const MergeTokens& op;
  uint32_t width, at;
  const T* source;  // of token 0
  int64_t stride_token;
  float sums[kSize] = {};
  float total = 0.0f;

  __device__ __forceinline__ MergeColumn(const MergeTokens& op, int64_t batch, uint32_t column)
      : op(op), width(static_cast<uint32_t>(op.num_heads * op.head_dim)), at(column * kSize) {
    const uint32_t head_dim = static_cast<uint32_t>(op.head_dim), within = at < width ? at : at - width;
    const Tokens& tokens = at < width ? op.k : op.v;
    source = static_cast<const T*>(tokens.data) + batch * tokens.stride_batch +
             int64_t{within / head_dim} * tokens.stride_head + int64_t{within % head_dim} * tokens.stride_dim;
    stride_token = tokens.stride_token;
  }

  __device__ __forceinline__ bool inside() const { return at < 2 * width; }

  // Adds members begin..end - 1, kInFlight loads at a time.
  template <int kInFlight, typename Token, typename Weight>
  __device__ __forceinline__ void add(int32_t begin, int32_t end, Token token, Weight weight) {
    for (int32_t next = begin; next < end; next += kInFlight) {
      Vec<T, kSize> loaded[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (inside() && next + i < end) loaded[i].load(source + token(next + i) * stride_token);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (next + i >= end) break;
        float values[kSize];
        loaded[i].widen(values);
        const float factor = weight(next + i);
        total += factor;
#pragma unroll
        for (int j = 0; j < kSize; ++j) sums[j] += factor * values[j];
      }
    }
  }

  __device__ __forceinline__ void write(int64_t row) {
    if (at == 0) op.sizes_out[row] = total;
    if (!inside()) return;
    const bool empty = total == 0.0f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[i] = empty ? 0.0f : sums[i] / total;
    void* out = at < width ? op.k_out : op.v_out;
    store_as(static_cast<T*>(out) + row * width + (at < width ? at : at - width), sums);
  }
};

inline constexpr int kScanThreads = 256, kScanInFlight = 7;
inline constexpr int kListed = 2048;  // tokens gone through at a time

struct MergeList {
  int32_t tokens[kListed];
  float weights[kListed];
};

// Lists the members of `group` among the `count` tokens from `first` on, in order; returns their number.
__device__ __forceinline__ int32_t list_members(const MergeTokens& op, int64_t batch, int32_t group,
                                                int32_t first, int32_t count, MergeList& list) {
  constexpr int kWarps = kScanThreads / 32, kWords = kListed / kScanThreads;
  __shared__ int32_t warp_counts[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int32_t* groups = op.groups + batch * op.seq_len + first;
  const int32_t own = warp * kWords * 32 + lane;
  int32_t found[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) found[i] = own + i * 32 < count ? groups[own + i * 32] : -1;
  uint32_t masks[kWords];
  int32_t members = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    masks[i] = __ballot_sync(~0u, found[i] == group);
    members += __popc(masks[i]);
  }
  if (lane == 0) warp_counts[warp] = members;
  __syncthreads();  // also: nobody reads the list any more
  int32_t number = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) number += warp_counts[i];
    total += warp_counts[i];
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (masks[i] >> lane & 1) {
      const int32_t at = number + __popc(masks[i] & ((1u << lane) - 1)), token = first + own + i * 32;
      list.tokens[at] = token;
      list.weights[at] = weight_of(op, batch, token);
    }
    number += __popc(masks[i]);
  }
  __syncthreads();
  return total;
}

// One row and kColumns of its columns a block.
template <typename T, int kSize, int kColumns>
__global__ void __launch_bounds__(kScanThreads, 4)
    merge_scanned_kernel(const __grid_constant__ MergeKernel p) {
  constexpr int kSplits = kScanThreads / kColumns;
  __shared__ MergeList list;
  __shared__ float partial[kSplits][kSize + 1][kColumns];
  const MergeTokens& op = p.op;
  const uint32_t column_block = blockIdx.x % p.column_blocks, row = blockIdx.x / p.column_blocks;
  const int64_t batch = row / static_cast<uint32_t>(op.num_groups);
  const auto group = static_cast<int32_t>(row % static_cast<uint32_t>(op.num_groups));
  const int64_t wanted = op.seq_lens ? op.seq_lens[batch] : op.seq_len;
  const auto length = static_cast<int32_t>(max(int64_t{0}, min(wanted, op.seq_len)));
  const int own = static_cast<int>(threadIdx.x) % kColumns, split = static_cast<int>(threadIdx.x) / kColumns;
  MergeColumn<T, kSize> column(op, batch, column_block * kColumns + own);

  for (int64_t first = 0; first < length; first += kListed) {
    const auto tokens = static_cast<int32_t>(min(length - first, int64_t{kListed}));
    const int32_t members = list_members(op, batch, group, static_cast<int32_t>(first), tokens, list);
    column.template add<kScanInFlight>(
        members * split / kSplits, members * (split + 1) / kSplits, [&](int32_t i) { return list.tokens[i]; },
        [&](int32_t i) { return list.weights[i]; });
  }

#pragma unroll
  for (int i = 0; i < kSize; ++i) partial[split][i][own] = column.sums[i];
  partial[split][kSize][own] = column.total;
  __syncthreads();
  if (split > 0) return;
  for (int other = 1; other < kSplits; ++other) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) column.sums[i] += partial[other][i][own];
    column.total += partial[other][kSize][own];
  }
  column.write(row);
}

inline constexpr int kSortedThreads = 128, kSortedInFlight = 2;

// kSortedThreads / kColumns rows and kColumns of their columns a block.
template <typename T, int kSize, int kColumns>
__global__ void __launch_bounds__(kSortedThreads, 10)
    merge_sorted_kernel(const __grid_constant__ MergeKernel p) {
  constexpr int kRows = kSortedThreads / kColumns;
  const MergeTokens& op = p.op;
  const uint32_t column_block = blockIdx.x % p.column_blocks, rest = blockIdx.x / p.column_blocks;
  const int64_t batch = rest / p.group_blocks;
  const int64_t group = int64_t{rest % p.group_blocks} * kRows + threadIdx.x / kColumns;
  if (group >= op.num_groups) return;
  const int32_t* start = p.starts + batch * (op.num_groups + 1) + group;
  const int32_t* order = p.order + batch * op.seq_len;
  MergeColumn<T, kSize> column(op, batch, column_block * kColumns + threadIdx.x % kColumns);
  column.template add<kSortedInFlight>(
      start[0], start[1], [&](int32_t i) { return order[i]; },
      [&](int32_t i) { return weight_of(op, batch, order[i]); });
  column.write(batch * op.num_groups + group);
}

}  // namespace livevlm
