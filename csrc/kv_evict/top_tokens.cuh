// SPDX-License-Identifier: Apache-2.0
// The best tokens of a row, found by one thread block: what select_tokens and evict_similar share.
//
// A radix search over the digits of the keys finds the smallest key that is still taken, and how many of the
// tokens that have just this key: the first ones in the row.
#pragma once

#include "kv_evict/row_keys.cuh"

namespace livevlm {

inline constexpr int kDigits = 1 << 11, kPasses = 3;  // of 11, 11 and 10 bits
static_assert(kDigits == 2 * kRowThreads, "find_bin gives each thread two");

// Place of a key's lowest bit that belongs to a digit; the first digit is the highest.
__device__ __forceinline__ int digit_shift(int pass) {
  return pass == 0 ? 21 : pass == 1 ? 10 : 0;
}

// Which tokens are taken: those with a larger key than `key`, and those with this key up to `last`.
struct Cut {
  uint32_t key;
  int32_t last;
  int32_t taken;  // how many that are

  __device__ __forceinline__ bool takes(uint32_t other, int32_t token) const {
    return (other > key) | ((other == key) & (token <= last));
  }
};

struct TopShared {
  alignas(8) uint32_t histogram[kPasses][kDigits];
  uint32_t of_warps[kPasses][kRowWarps];
  uint32_t counts[kRowWarps];  // there is a barrier between any two uses
  int32_t last;
};

// Sum over the lanes up to this one.
__device__ __forceinline__ uint32_t sum_up_to_lane(uint32_t value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t below = __shfl_up_sync(~0u, value, step);
    if (row_lane() >= step) value += below;
  }
  return value;
}

// A histogram's bin that key number `wanted` falls into, counted from the largest down.
struct Bin {
  uint32_t total;  // of the histogram; the rest means nothing if it is less than `wanted`
  uint32_t digit, size;
  uint32_t rest;  // key number `rest` of this bin is meant
};

// Warps and their lanes have the bins in order, from the largest down, two a lane. Every warp searches, which
// spares a barrier.
__device__ __forceinline__ Bin find_bin(const uint32_t* histogram, uint32_t* of_warps, uint32_t wanted) {
  const auto place = [](int warp) { return kRowThreads - 1 - (warp * 32 + row_lane()); };
  const auto* pairs = reinterpret_cast<const uint2*>(histogram);
  const uint2 own = pairs[place(row_warp())];
  const uint32_t own_sum = __reduce_add_sync(~0u, own.x + own.y);
  if (row_lane() == 0) of_warps[row_warp()] = own_sum;
  __syncthreads();
  const uint32_t of_warp = of_warps[row_lane()], up_to_warp = sum_up_to_lane(of_warp);
  const int warp = (__ffs(static_cast<int>(__ballot_sync(~0u, up_to_warp >= wanted))) - 1) & 31;
  const uint2 pair = pairs[place(warp)];
  const uint32_t before_warp = __shfl_sync(~0u, up_to_warp - of_warp, warp);
  const uint32_t up_to_low = before_warp + sum_up_to_lane(pair.x + pair.y), up_to_high = up_to_low - pair.x;
  const bool high = up_to_high >= wanted;
  const int lane = (__ffs(static_cast<int>(__ballot_sync(~0u, up_to_low >= wanted))) - 1) & 31;
  Bin bin;
  bin.total = __shfl_sync(~0u, up_to_warp, 31);
  bin.digit = __shfl_sync(~0u, static_cast<uint32_t>(place(warp) * 2) + (high ? 1 : 0), lane);
  bin.size = __shfl_sync(~0u, high ? pair.y : pair.x, lane);
  bin.rest = __shfl_sync(~0u, wanted - (high ? up_to_high - pair.y : up_to_high), lane);
  return bin;
}

// Sum of all threads' values, and of those in the warps before this one.
struct WarpSums {
  uint32_t before, total;
};

__device__ __forceinline__ WarpSums sum_over_warps(uint32_t value, TopShared& shared) {
  const uint32_t own = __reduce_add_sync(~0u, value);
  if (row_lane() == 0) shared.counts[row_warp()] = own;
  __syncthreads();
  const uint32_t of_warp = shared.counts[row_lane()];
  return {__reduce_add_sync(~0u, row_lane() < row_warp() ? of_warp : 0u), __reduce_add_sync(~0u, of_warp)};
}

// Numbers the tokens that taken(token, key, j) names, in order; calls write(number, token) for each. Returns
// their number.
template <typename Keys, typename Taken, typename Write>
__device__ __forceinline__ uint32_t number_keys(const Keys& keys, TopShared& shared, Taken taken,
                                                Write write) {
  uint32_t count = 0;
  keys.each([&](int32_t token, uint32_t key, auto j) { count += taken(token, key, j) ? 1 : 0; });
  const WarpSums sums = sum_over_warps(count, shared);
  uint32_t number = sums.before;
  keys.each([&](int32_t token, uint32_t key, auto j) {
    const bool named = taken(token, key, j);
    const uint32_t mask = __ballot_sync(~0u, named);
    if (named) write(number + __popc(mask & ((1u << row_lane()) - 1)), token);
    number += __popc(mask);
  });
  return sums.total;
}

// The cut that takes the `count` tokens with the largest keys, or all with a key, where view(token, key, j)
// gives what counts as the key. With `all_infinite`, tokens with kAlwaysKey are taken even if they are more,
// up to `limit`.
template <typename Keys, typename View>
__device__ __forceinline__ Cut find_cut(const Keys& keys, uint32_t count, bool all_infinite, uint32_t limit,
                                        TopShared& shared, View view) {
  __syncthreads();  // a search before this one may still read
  for (int i = static_cast<int>(threadIdx.x); i < kPasses * kDigits; i += kRowThreads) {
    shared.histogram[i / kDigits][i % kDigits] = 0;
  }
  __syncthreads();
  uint32_t prefix = 0;  // digits found so far
  uint32_t rest = count;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = digit_shift(pass);
    const uint32_t known = pass == 0 ? 0u : pass == 1 ? ~0u << 21 : ~0u << 10;
    const uint32_t digits = pass == 2 ? kDigits / 2 - 1 : kDigits - 1;
    uint32_t* histogram = shared.histogram[pass];
    keys.each([&](int32_t token, uint32_t key_here, auto j) {
      const uint32_t key = view(token, key_here, j);
      if (key != kNeverKey && (key & known) == prefix) atomicAdd(&histogram[key >> shift & digits], 1u);
    });
    __syncthreads();
    if (pass == 0 && all_infinite) rest = count = min(max(count, histogram[kAlwaysKey >> 21]), limit);
    const Bin bin = find_bin(histogram, shared.of_warps[pass], rest);
    if (pass == 0 && bin.total <= count) return {kNeverKey, -1, static_cast<int32_t>(bin.total)};
    if (count == 0) return {~0u, -1, 0};
    prefix |= bin.digit << shift;
    rest = bin.rest;
    // All of the bin: lower digits do not matter.
    if (rest == bin.size) return {prefix, INT32_MAX, static_cast<int32_t>(count)};
  }
  number_keys(
      keys, shared, [&](int32_t token, uint32_t key, auto j) { return view(token, key, j) == prefix; },
      [&](uint32_t number, int32_t token) {
        if (number + 1 == rest) shared.last = token;
      });
  __syncthreads();
  return {prefix, shared.last, static_cast<int32_t>(count)};
}

// Writes the tokens that taken(token, key, j) names to indices[0, width), then -1; returns how many they are.
// None is beyond `width`.
template <typename Keys, typename Taken>
__device__ __forceinline__ int32_t write_indices(const Keys& keys, int64_t width, int32_t* indices,
                                                 TopShared& shared, Taken taken) {
  const uint32_t total =
      number_keys(keys, shared, taken, [&](uint32_t number, int32_t token) { indices[number] = token; });
  for (int64_t i = int64_t{total} + threadIdx.x; i < width; i += kRowThreads) indices[i] = -1;
  return static_cast<int32_t>(total);
}

}  // namespace livevlm
