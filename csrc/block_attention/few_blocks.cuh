// SPDX-License-Identifier: Apache-2.0
// The best blocks of a row of scores, found by one thread block with few barriers: a row is short, and what
// takes time is threads waiting for each other.
//
// A histogram of the highest bits finds the bin of the last key that is still taken. If few keys share the
// bin they are gathered and ranked, each against all others; if many do, the next bits are counted first.
// Of the best few of many it is enough to count the best key of each thread: at least as many keys as are
// wanted are not below the bin that these find, and hardly more.
// What is taken is a bit a block in shared memory, from which the table is written in order.
#pragma once

#include "block_attention/retrieve_blocks.cuh"
#include "kv_evict/row_keys.cuh"

namespace livevlm {

inline constexpr int kBins = 2048, kBinPasses = 3;  // 11, 11 and 10 bits of a key
inline constexpr int kMostTied = 160;               // keys that are ranked at once

// By itself in 16 bytes: it is read with one load, and what else that would touch might be written meanwhile.
struct alignas(16) FoundBin {
  uint32_t digit, size;
  uint32_t rest;  // how many of this bin are taken
};

struct PickShared {
  alignas(16) uint32_t histogram[kBinPasses + 1][kBins];  // the last is of best keys
  alignas(16) unsigned long long tied[kMostTied];  // key, then the complement of the block: larger is better
  uint32_t num_tied;
  FoundBin bin;
  uint32_t sums[kBinPasses + 1][32];  // of warps; used in turns
};

// Bytes behind PickShared: marks of blocks, and how many are marked before each word of them.
inline int64_t mark_bytes(int64_t blocks) {
  return ceil_div(blocks, 32) * 2 * static_cast<int64_t>(sizeof(uint32_t));
}

struct BeforeAndAll {
  uint32_t before, all;
};

// Sum of the values of the threads before this one, and of all.
template <int kThreads>
__device__ __forceinline__ BeforeAndAll sum_before(uint32_t value, uint32_t* sums) {
  const int lane = row_lane(), warp = row_warp();
  uint32_t up_to = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t below = __shfl_up_sync(~0u, up_to, step);
    if (lane >= step) up_to += below;
  }
  if (lane == 31) sums[warp] = up_to;
  __syncthreads();
  const uint32_t of_warp = lane < kThreads / 32 ? sums[lane] : 0;
  return {__reduce_add_sync(~0u, lane < warp ? of_warp : 0u) + up_to - value,
          __reduce_add_sync(~0u, of_warp)};
}

// Finds the bin of key number `wanted`, from the largest down, by all threads. False if there are not so many
// keys.
template <int kThreads>
__device__ __forceinline__ bool find_bin(const uint32_t* histogram, uint32_t* sums, FoundBin& found,
                                         uint32_t wanted) {
  constexpr int kOwn = kBins / kThreads;  // bins of a thread
  const int first = kBins - (static_cast<int>(threadIdx.x) + 1) * kOwn;
  const auto* own = static_cast<const uint32_t*>(__builtin_assume_aligned(histogram + first, kOwn * 4));
  uint32_t counts[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) counts[i] = own[i];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += counts[i];
  const BeforeAndAll larger = sum_before<kThreads>(sum, sums);
  if (larger.before < wanted && wanted <= larger.before + sum) {
    uint32_t rest = wanted - larger.before;
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) {
      if (rest != 0 && rest <= counts[i]) {
        found = {static_cast<uint32_t>(first + i), counts[i], rest};
        rest = 0;
      } else if (rest != 0) {
        rest -= counts[i];
      }
    }
  }
  __syncthreads();
  return wanted <= larger.all;
}

template <int kThreads>
struct Picker {
  PickShared& shared;
  uint32_t* marks;   // a bit for each block that is taken
  uint32_t* before;  // marks before each word
  int32_t blocks;

  __device__ __forceinline__ Picker(PickShared* memory, int32_t num_blocks)
      : shared(*memory),
        marks(reinterpret_cast<uint32_t*>(memory + 1)),
        before(marks + (num_blocks + 31) / 32),
        blocks(num_blocks) {
    uint4* bins = reinterpret_cast<uint4*>(shared.histogram);
    for (int i = static_cast<int>(threadIdx.x); i < (kBinPasses + 1) * kBins / 4; i += kThreads)
      bins[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) shared.num_tied = 0;
  }

  __device__ __forceinline__ bool find_bin(int pass, uint32_t wanted) {
    return livevlm::find_bin<kThreads>(shared.histogram[pass], shared.sums[pass], shared.bin, wanted);
  }

  // Marks the `wanted` best blocks of those that have a key; of equal keys the first.
  template <typename Keys>
  __device__ __forceinline__ void pick(const Keys& keys, uint32_t wanted) {
    const auto mark = [&](int32_t block, bool taken) {
      const uint32_t votes = __ballot_sync(~0u, taken);
      if (row_lane() == 0) marks[block / 32] = votes;
    };
    const auto mark_from = [&](uint32_t least) {
      keys.each([&](int32_t block, uint32_t key) { mark(block, key >= least); });
    };
    if (wanted == 0) {
      keys.each([&](int32_t block, uint32_t) { mark(block, false); });
      return;
    }
    if (wanted <= kMostTied / 2 && blocks > 2 * kThreads && pick_few(keys, wanted, mark)) return;
    uint32_t prefix = 0;  // the bits of the last key that are known
    FoundBin bin{0, 0, wanted};
#pragma unroll 1
    for (int pass = 0; pass < kBinPasses; ++pass) {
      const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
      const uint32_t known = pass == 0 ? 0u : pass == 1 ? ~0u << 21 : ~0u << 10;
      const uint32_t digits = pass == 2 ? kBins / 2 - 1 : kBins - 1;
      keys.each([&](int32_t, uint32_t key) {
        if (key != kNeverKey && (key & known) == prefix)
          atomicAdd(&shared.histogram[pass][key >> shift & digits], 1u);
      });
      __syncthreads();
      if (!find_bin(pass, bin.rest)) return mark_from(kNeverKey + 1);  // only in the first pass
      bin = shared.bin;
      prefix |= bin.digit << shift;
      if (bin.rest == bin.size) return mark_from(max(prefix, kNeverKey + 1));
      if (bin.size <= kMostTied) {
        const uint32_t last = prefix | ((1u << shift) - 1);
        if (threadIdx.x == 0) shared.num_tied = 0;
        __syncthreads();
        gather(keys, prefix, last, mark);
        return mark_tied(bin.rest);
      }
    }
    mark_equal(keys, prefix, bin.rest, mark);
  }

  // The same, by best keys of threads. False if too many keys were found.
  template <typename Keys, typename Mark>
  __device__ __forceinline__ bool pick_few(const Keys& keys, uint32_t wanted, Mark mark) {
    uint32_t best = kNeverKey;
    keys.each([&](int32_t, uint32_t key) { best = max(best, key); });
    if (best != kNeverKey) atomicAdd(&shared.histogram[kBinPasses][best >> 21], 1u);
    __syncthreads();
    if (!find_bin(kBinPasses, wanted)) return false;
    gather(keys, shared.bin.digit << 21, ~0u, mark);
    __syncthreads();
    if (shared.num_tied > kMostTied) return false;
    mark_tied(wanted);
    return true;
  }

  // Gathers the keys from `least` to `last`, and marks those above.
  template <typename Keys, typename Mark>
  __device__ __forceinline__ void gather(const Keys& keys, uint32_t least, uint32_t last, Mark mark) {
    least = max(least, kNeverKey + 1);
    keys.each([&](int32_t block, uint32_t key) {
      mark(block, key > last);
      if (key < least || key > last) return;
      const uint32_t place = atomicAdd(&shared.num_tied, 1u);
      if (place < kMostTied)
        shared.tied[place] = static_cast<unsigned long long>(key) << 32 | ~static_cast<uint32_t>(block);
    });
  }

  // Marks the best `wanted` of the keys that were gathered: a thread has one, and counts those above it.
  __device__ __forceinline__ void mark_tied(uint32_t wanted) {
    static_assert(kMostTied <= kThreads, "a thread each");
    __syncthreads();
    const uint32_t count = shared.num_tied;
    if (threadIdx.x >= count) return;
    const unsigned long long key = shared.tied[threadIdx.x];
    const auto* pairs = reinterpret_cast<const ulonglong2*>(shared.tied);
    uint32_t better = 0;
#pragma unroll 8
    for (uint32_t i = 0; i < count / 2; ++i) {
      const ulonglong2 pair = pairs[i];
      better += (pair.x > key ? 1 : 0) + (pair.y > key ? 1 : 0);
    }
    if (count % 2 != 0 && shared.tied[count - 1] > key) ++better;
    const uint32_t block = ~static_cast<uint32_t>(key);
    if (better < wanted) atomicOr(&marks[block / 32], 1u << block % 32);
  }

  // Of many keys that are all equal, marks the first `rest`.
  template <typename Keys, typename Mark>
  __device__ __forceinline__ void mark_equal(const Keys& keys, uint32_t equal, uint32_t rest, Mark mark) {
    keys.each([&](int32_t block, uint32_t key) { mark(block, key == equal); });
    count_marks(shared.sums[0]);
    keys.each([&](int32_t block, uint32_t key) {
      const uint32_t below = __popc(marks[block / 32] & ((1u << row_lane()) - 1));
      const bool taken = key > equal || (key == equal && before[block / 32] + below < rest);
      mark(block, taken);  // whose ballot comes after all lanes have read the word
    });
  }

  // How many blocks are marked before each word of marks; returns how many in all.
  __device__ __forceinline__ uint32_t count_marks(uint32_t* sums) {
    __syncthreads();
    const int words = (blocks + 31) / 32, share = (words + kThreads - 1) / kThreads;
    const int first = min(static_cast<int>(threadIdx.x) * share, words), end = min(first + share, words);
    uint32_t sum = 0;
    for (int i = first; i < end; ++i) sum += static_cast<uint32_t>(__popc(marks[i]));
    const BeforeAndAll others = sum_before<kThreads>(sum, sums);
    sum = others.before;
    for (int i = first; i < end; ++i) {
      before[i] = sum;
      sum += static_cast<uint32_t>(__popc(marks[i]));
    }
    __syncthreads();
    return others.all;
  }

  // Writes the marked blocks in order, then -1. They are no more than `width`.
  __device__ __forceinline__ void write(int32_t* table, int64_t width, int32_t* count) {
    const uint32_t all = count_marks(shared.sums[1]);
    if (threadIdx.x == 0) *count = static_cast<int32_t>(all);
    for (int32_t block = static_cast<int32_t>(threadIdx.x); block < blocks; block += kThreads) {
      const uint32_t word = marks[block / 32], below = word & ((1u << row_lane()) - 1);
      if (word >> row_lane() & 1) table[before[block / 32] + static_cast<uint32_t>(__popc(below))] = block;
    }
    for (int64_t i = int64_t{all} + threadIdx.x; i < width; i += kThreads) table[i] = -1;
  }
};

}  // namespace livevlm
