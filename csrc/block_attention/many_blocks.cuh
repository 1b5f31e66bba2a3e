// SPDX-License-Identifier: Apache-2.0
// The best blocks of a row, found by a cluster of thread blocks with a stretch of the row each.
//
// A radix search from the highest bits of the keys down: each thread block counts its own keys by their next
// bits and adds its counts to a histogram in every other, so that all find the same bin, that of the last key
// that is taken. The search ends with a bin whose keys are all taken. Then the thread blocks tell each other
// how many of their blocks are taken, and each writes its own to the table, in order. What takes time is
// waiting for each other: a pass has one exchange of mail. Before sm_90 a cluster is one thread block.
#pragma once

#include "block_attention/few_blocks.cuh"

namespace livevlm {

inline constexpr int kManyThreads = 512, kManyWarps = kManyThreads / 32;
inline constexpr int kMostRanks = 16;  // thread blocks of a cluster

struct ClusterShared {
  alignas(16) uint32_t all[kBinPasses][kBins];  // of the cluster
  alignas(16) uint32_t own[kBins];
  uint2 listed[kBins];  // bins of `own` that are not empty, and their sizes
  uint32_t num_listed[kBinPasses];
  FoundBin bin;
  uint32_t sums[kBinPasses][kManyWarps];
  uint32_t above[kManyWarps], equal[kManyWarps];
  uint32_t ranks_above[kMostRanks], ranks_equal[kMostRanks], ranks_poisoned;
  uint64_t bins_box[kBinPasses], counts_box, poison_box;
};

// Which keys are taken: those from `least` on, and the first `rest` that are equal to `tied`.
struct KeyCut {
  uint32_t least, tied, rest;
};

// The blocks of a row that a thread block has.
struct RowPart {
  uint32_t rank, size;  // of the thread block; of the cluster
  int32_t first, count;

  __device__ __forceinline__ RowPart(int32_t blocks, int32_t cluster_size)
      : rank(cluster_rank()), size(static_cast<uint32_t>(cluster_size)) {
    const int32_t each = (blocks + cluster_size - 1) / cluster_size;
    first = min(static_cast<int32_t>(rank) * each, blocks);
    count = min(each, blocks - first);
  }
};

// Before anything of the cluster: what others add to must be zero. Ends in a cluster_arrive().
__device__ __forceinline__ void clear(ClusterShared& shared, uint32_t cluster_size) {
  auto* bins = reinterpret_cast<uint4*>(shared.all);
  for (int i = static_cast<int>(threadIdx.x); i < (kBinPasses + 1) * kBins / 4; i += kManyThreads)
    bins[i] = make_uint4(0, 0, 0, 0);
  if (threadIdx.x < kBinPasses) shared.num_listed[threadIdx.x] = 0;
  if (threadIdx.x < kBinPasses) open_mailbox(&shared.bins_box[threadIdx.x], cluster_size);
  if (threadIdx.x == 0) {
    shared.ranks_poisoned = 0;
    open_mailbox(&shared.counts_box, cluster_size);
    open_mailbox(&shared.poison_box, cluster_size);
  }
  cluster_arrive();
}

// Calls f(i, key) for keys i = begin, begin + step, ... below `end`, several of which are loaded together.
template <typename KeyOf, typename F>
__device__ __forceinline__ void each_key(int32_t begin, int32_t step, int32_t end, KeyOf key_of, F f) {
  constexpr int kAhead = 4;
  for (; begin - row_lane() < end; begin += kAhead * step) {
    uint32_t keys[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) keys[a] = begin + a * step < end ? key_of(begin + a * step) : kNeverKey;
#pragma unroll
    for (int a = 0; a < kAhead; ++a) f(begin + a * step, keys[a]);
  }
}

// Adds this block's histogram to those of all, and empties it. A warp adds to one of them at a time.
__device__ __forceinline__ void add_to_all(ClusterShared& shared, const RowPart& own, int pass) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kBins / kManyThreads; ++i) {
    const auto bin = static_cast<uint32_t>(i * kManyThreads) + threadIdx.x;
    const uint32_t count = shared.own[bin];
    if (count == 0) continue;
    shared.own[bin] = 0;
    shared.listed[atomicAdd(&shared.num_listed[pass], 1u)] = make_uint2(bin, count);
  }
  __syncthreads();
  // `size` is a power of two; the blocks don't all add to the same one at a time.
  const uint32_t listed = shared.num_listed[pass];
  if (threadIdx.x < own.size) announce_mail(threadIdx.x, &shared.bins_box[pass], listed);
  for (auto i = static_cast<uint32_t>(row_warp()); i < max(own.size, uint32_t{kManyWarps}); i += kManyWarps) {
    const uint32_t rank = (i + own.rank) & (own.size - 1), step = max(32 * kManyWarps / own.size, 32u);
    for (uint32_t at = i / own.size * 32 + threadIdx.x % 32; at < listed; at += step) {
      const uint2 bin = shared.listed[at];
      send_to_add(rank, &shared.bins_box[pass], &shared.all[pass][bin.x], bin.y);
    }
  }
  wait_for_mail(&shared.bins_box[pass]);
}

// key_of(i): key i of the part. After a cluster_wait().
template <typename KeyOf>
__device__ __forceinline__ KeyCut find_cut(ClusterShared& shared, const RowPart& own, KeyOf key_of,
                                           uint32_t wanted) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (wanted == 0) return {~0u, kNeverKey, 0};
  uint32_t prefix = 0;  // the bits of the last key that are known
#pragma unroll 1
  for (int pass = 0; pass < kBinPasses; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const uint32_t known = pass == 0 ? 0u : pass == 1 ? ~0u << 21 : ~0u << 10;
    const uint32_t digits = pass == 2 ? kBins / 2 - 1 : kBins - 1;
    each_key(thread, kManyThreads, own.count, key_of, [&](int32_t, uint32_t key) {
      if (key != kNeverKey && (key & known) == prefix) atomicAdd(&shared.own[key >> shift & digits], 1u);
    });
    add_to_all(shared, own, pass);
    if (!find_bin<kManyThreads>(shared.all[pass], shared.sums[pass], shared.bin, wanted))
      return {kNeverKey + 1, kNeverKey, 0};  // only in the first pass
    prefix |= shared.bin.digit << shift;
    wanted = shared.bin.rest;
    if (wanted == shared.bin.size) return {max(prefix, kNeverKey + 1), kNeverKey, 0};
  }
  return {prefix + 1, prefix, wanted};
}

// Writes the blocks that are taken in order, then -1. They are no more than `width`.
template <typename KeyOf>
__device__ __forceinline__ void write_picked(ClusterShared& shared, const RowPart& own, KeyOf key_of,
                                             const KeyCut& cut, int32_t* table, int64_t width,
                                             int32_t* count) {
  const int lane = row_lane(), warp = row_warp();
  const int32_t words = (own.count + 31) / 32, share = (words + kManyWarps - 1) / kManyWarps * 32;
  const int32_t begin = warp * share + lane, end = min(warp * share + share, own.count);
  uint32_t above = 0, equal = 0;
  each_key(begin, 32, end, key_of, [&](int32_t, uint32_t key) {
    above += key >= cut.least ? 1 : 0;
    equal += key == cut.tied ? 1 : 0;
  });
  above = __reduce_add_sync(~0u, above), equal = __reduce_add_sync(~0u, equal);
  if (lane == 0) shared.above[warp] = above, shared.equal[warp] = equal;
  __syncthreads();
  const uint32_t warps_above = lane < kManyWarps ? shared.above[lane] : 0;
  const uint32_t warps_equal = lane < kManyWarps ? shared.equal[lane] : 0;
  above = __reduce_add_sync(~0u, warps_above), equal = __reduce_add_sync(~0u, warps_equal);
  if (threadIdx.x < own.size) {
    announce_mail(threadIdx.x, &shared.counts_box, 2);
    send(threadIdx.x, &shared.counts_box, &shared.ranks_above[own.rank], above);
    send(threadIdx.x, &shared.counts_box, &shared.ranks_equal[own.rank], equal);
  }
  wait_for_mail(&shared.counts_box);
  const auto is_rank = static_cast<uint32_t>(lane) < own.size;
  const uint32_t ranks_above = is_rank ? shared.ranks_above[lane] : 0;
  const uint32_t ranks_equal = is_rank ? shared.ranks_equal[lane] : 0;
  const bool rank_before = static_cast<uint32_t>(lane) < own.rank;
  above = __reduce_add_sync(~0u, (rank_before ? ranks_above : 0) + (lane < warp ? warps_above : 0));
  equal = __reduce_add_sync(~0u, (rank_before ? ranks_equal : 0) + (lane < warp ? warps_equal : 0));
  const uint32_t all =
      __reduce_add_sync(~0u, ranks_above) + min(__reduce_add_sync(~0u, ranks_equal), cut.rest);
  each_key(begin, 32, end, key_of, [&](int32_t i, uint32_t key) {
    const uint32_t is_above = __ballot_sync(~0u, key >= cut.least);
    const uint32_t is_equal = __ballot_sync(~0u, key == cut.tied), below = (1u << lane) - 1;
    const uint32_t equal_before = equal + static_cast<uint32_t>(__popc(is_equal & below));
    const uint32_t place =
        above + static_cast<uint32_t>(__popc(is_above & below)) + min(equal_before, cut.rest);
    if (key >= cut.least || (key == cut.tied && equal_before < cut.rest)) table[place] = own.first + i;
    above += static_cast<uint32_t>(__popc(is_above)), equal += static_cast<uint32_t>(__popc(is_equal));
  });
  if (own.rank == 0 && threadIdx.x == 0) *count = static_cast<int32_t>(all);
  for (int64_t i = int64_t{all} + own.rank * kManyThreads + threadIdx.x; i < width;
       i += own.size * kManyThreads)
    table[i] = -1;
}

}  // namespace livevlm
