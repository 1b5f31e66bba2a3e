// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of `select_tokens` for long rows: one thread block a chunk of a row.
//
// The plan of select_tokens.cuh, cut into launches where it needs all of a row: keys and the histogram of
// their first digit, two more digits, flags and counts by chunk, indices. With buckets there are the marking
// of the second and another search in between.
#pragma once

#include "kv_evict/long_words.cuh"

namespace livevlm {

__device__ __forceinline__ void clear_histogram(uint32_t* histogram) {
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kRowThreads) histogram[i] = 0;
}

// Integers: their sum does not depend on which block comes first.
__device__ __forceinline__ void add_histogram(const uint32_t* histogram, uint32_t* of_row) {
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kRowThreads) {
    if (histogram[i] > 0) atomicAdd(of_row + i, histogram[i]);
  }
}

struct NoBuckets {
  __device__ __forceinline__ uint32_t next(int32_t) { return ~0u; }
};

// Raises the threshold of the bucket to the best of a warp's tokens. Mostly they are all in one bucket: then
// one of them speaks for all.
__device__ __forceinline__ void raise_threshold(int32_t token, uint32_t key, uint32_t bucket,
                                                uint32_t num_buckets, unsigned long long* thresholds) {
  bool speaks = key != kNeverKey && bucket < num_buckets;
  if (__all_sync(~0u, bucket == __shfl_sync(~0u, bucket, 0))) {
    const uint32_t equals = __ballot_sync(~0u, key == __reduce_max_sync(~0u, key));
    speaks = speaks && row_lane() == __ffs(static_cast<int>(equals)) - 1;
  }
  if (speaks) atomicMax(thresholds + bucket, rank_of(key, token));
}

// Keys, the histogram of their first digit, and with `raise` each bucket's best token.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 1) order_chunk_kernel(const __grid_constant__ LongRows p) {
  __shared__ TopShared shared;
  const Chunk chunk(p);
  const SelectTokens& op = p.select.op;
  if (chunk.begin == chunk.end) return;
  clear_histogram(shared.histogram[0]);
  __syncthreads();
  const T* scores = static_cast<const T*>(op.scores) + chunk.row * op.stride_batch;
  const auto key_of = [scores, stride = op.stride_token](int32_t token) {
    return score_key(static_cast<float>(__ldg(scores + int64_t{token} * stride)));
  };
  const RowKeys<false, decltype(key_of)> keys(chunk.end, key_of, nullptr, chunk.begin);
  uint32_t* ordered = p.keys + chunk.row * op.seq_len;
  const auto order = [&](auto walk, auto raise) {
    keys.template each_with<4>([&](int32_t token) { return walk.next(token); },
                               [&](int32_t token, uint32_t key, auto, uint32_t bucket) {
                                 if (token < chunk.end) ordered[token] = key;
                                 if (key != kNeverKey) atomicAdd(&shared.histogram[0][key >> 21], 1u);
                                 if (raise)
                                   raise_threshold(token, key, bucket, bucket_count(op),
                                                   p.select.thresholds + chunk.row * op.num_buckets);
                               });
  };
  if (op.num_top < op.budget && op.bucket_capacity == 1) {
    with_buckets(op, chunk.row, chunk.length, keys.token(0), [&](const auto& walk) { order(walk, true); });
  } else {
    order(NoBuckets{}, false);
  }
  __syncthreads();
  add_histogram(shared.histogram[0], row_histogram(p, chunk, 0));
}

// The histogram of the next digit.
__global__ void __launch_bounds__(kRowThreads, 1) count_digit_kernel(const __grid_constant__ LongRows p) {
  __shared__ TopShared shared;
  const Chunk chunk(p);
  clear_histogram(shared.histogram[0]);
  const LongCut cut = find_step(p, chunk, shared);
  if (cut.known == ~0u) return;
  __syncthreads();
  const int pass = p.step % kPasses + 1;
  const auto keys = chunk_keys(p, chunk);
  const ChunkFlags flags(p, chunk, p.step < kPasses);
  keys.each([&](int32_t, uint32_t key, uint32_t j) {
    const bool open = has_bit(Candidates(flags[j], cut.fill != 0).open);
    if (open && key != kNeverKey && (key & cut.known) == cut.key) {
      const uint32_t digits = pass == kPasses - 1 ? kDigits / 2 - 1 : kDigits - 1;
      atomicAdd(&shared.histogram[0][key >> digit_shift(pass) & digits], 1u);
    }
  });
  __syncthreads();
  add_histogram(shared.histogram[0], row_histogram(p, chunk, p.step < kPasses ? pass : kPasses + 1 + pass));
}

// The search has ended: flags what is taken, and the ties that some of are; counts both.
__global__ void __launch_bounds__(kRowThreads, 1) count_taken_kernel(const __grid_constant__ LongRows p) {
  __shared__ TopShared shared;
  const Chunk chunk(p);
  const LongCut cut = find_step(p, chunk, shared);
  const auto keys = chunk_keys(p, chunk);
  ChunkFlags flags(p, chunk, p.step < kPasses);
  const bool all_ties = cut.ties == kAllTies;
  uint32_t count = 0;  // of both, in halves: a chunk has 2^15 tokens at most
  keys.each([&](int32_t, uint32_t key, uint32_t j) {
    const Candidates candidates(flags[j], cut.fill != 0);
    const bool open = has_bit(candidates.open) && key != kNeverKey, equal = key == cut.key;
    const bool taken = has_bit(candidates.sure) || (open && (key > cut.key || (equal && all_ties)));
    const bool tie = open && equal && !all_ties;
    flags.set(j, taken, tie);
    count += (taken ? 1u : 0u) + (tie ? 1u << 16 : 0u);
  });
  const uint32_t total = sum_over_warps(count, shared).total;
  if (threadIdx.x == 0) p.counts[chunk.row * p.num_chunks + chunk.index] = {total & 0xffff, total >> 16};
}

// Flags the first and the second, and makes the histograms of the first digit of second and third.
__global__ void __launch_bounds__(kRowThreads, 1) mark_second_kernel(const __grid_constant__ LongRows p) {
  __shared__ TopShared shared;
  const Chunk chunk(p);
  const SelectTokens& op = p.select.op;
  if (chunk.begin == chunk.end) return;
  clear_histogram(shared.histogram[0]);
  clear_histogram(shared.histogram[1]);
  const auto keys = chunk_keys(p, chunk);
  ChunkFlags flags(p, chunk, false);
  const ChunkSums sums(p, chunk);
  TakenWords words(flags, sums, p.cuts[chunk.row * kSteps + p.step], shared);  // a barrier, too
  const uint32_t num_buckets = bucket_count(op);
  const unsigned long long* thresholds = p.select.thresholds + chunk.row * op.num_buckets;
  with_buckets(op, chunk.row, chunk.length, keys.token(0), [&](auto walk) {
    keys.template each_with<2>(
        [&](int32_t token) { return Bucket(walk.next(token), num_buckets, thresholds); },
        [&](int32_t token, uint32_t key, uint32_t j, const Bucket& bucket) {
          const bool first = has_bit(words.next(j)), other = key != kNeverKey && !first;
          const bool second = other && bucket.index < num_buckets && rank_of(key, token) >= bucket.threshold;
          if (other) atomicAdd(&shared.histogram[second ? 0 : 1][key >> 21], 1u);
          flags.set(j, first, second);
        });
  });
  __syncthreads();
  add_histogram(shared.histogram[0], row_histogram(p, chunk, kPasses));
  add_histogram(shared.histogram[1], row_histogram(p, chunk, kPasses + 1));
}

// Indices of what is taken, and -1 behind the last.
__global__ void __launch_bounds__(kRowThreads, 1) write_chunk_kernel(const __grid_constant__ LongRows p) {
  __shared__ TopShared shared;
  const Chunk chunk(p);
  const SelectTokens& op = p.select.op;
  const LongCut cut = p.cuts[chunk.row * kSteps + p.step];
  const ChunkFlags flags(p, chunk, false);
  const ChunkSums sums(p, chunk);
  TakenWords words(flags, sums, cut, shared);
  int32_t* indices = op.indices + chunk.row * op.budget;
  for (uint32_t j = 0; j < flags.num_words(); ++j) {
    const uint32_t number = words.number(), taken = words.next(j);
    const auto below = static_cast<uint32_t>(__popc(taken & ((1u << row_lane()) - 1)));
    if (has_bit(taken)) indices[number + below] = flags.token(j);
  }
  const uint32_t total = sums.total.x + min(sums.total.y, cut.ties);
#pragma unroll 1  // else there is a division for the number of turns
  for (int64_t i = total + int64_t{chunk.index} * kRowThreads + threadIdx.x; i < op.budget;
       i += int64_t{p.num_chunks} * kRowThreads) {
    indices[i] = -1;
  }
  if (chunk.index == 0 && threadIdx.x == 0) op.counts[chunk.row] = static_cast<int32_t>(total);
}

// With bucket_capacity > 1 thresholds are searched for in turns: a chunk's tokens are counted by digit...
__global__ void __launch_bounds__(kRowThreads, 1)
    count_bucket_digits_kernel(const __grid_constant__ LongRows p) {
  const Chunk chunk(p);
  const SelectTokens& op = p.select.op;
  if (chunk.begin == chunk.end) return;
  const auto keys = chunk_keys(p, chunk);
  const int64_t first = chunk.row * op.num_buckets;
  with_buckets(op, chunk.row, chunk.length, keys.token(0), [&](const auto& walk) {
    count_digits(keys, walk, bucket_count(op), p.shift, p.select.thresholds + first,
                 p.select.digits + first * 17);
  });
}

inline constexpr int kStartSearch = 64;  // as p.shift

// ... and a thread finds a bucket's digit.
__global__ void __launch_bounds__(kRowThreads, 1)
    find_bucket_digits_kernel(const __grid_constant__ LongRows p) {
  const SelectTokens& op = p.select.op;
  const int64_t i = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (i >= op.batch * op.num_buckets) return;
  const auto bucket = static_cast<uint32_t>(i % op.num_buckets);
  uint32_t* counts = p.select.digits + (i - bucket) * 17;
  if (p.shift == kStartSearch) {
    start_search(p.select, bucket, p.select.thresholds + i, counts);
  } else {
    find_digit(bucket, bucket_count(op), p.shift, p.select.thresholds + i, counts);
  }
#pragma unroll
  for (int digit = 0; digit < 16; ++digit) counts[int64_t{bucket} * 16 + digit] = 0;
}

}  // namespace livevlm
