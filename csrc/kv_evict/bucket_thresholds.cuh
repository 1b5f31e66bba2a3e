// SPDX-License-Identifier: Apache-2.0
// Buckets of select_tokens: which one a token is in, and the search for a bucket's threshold, the worst of
// its tokens that come by it.
#pragma once

#include "common/dtype.h"
#include "kv_evict/row_keys.cuh"
#include "kv_evict/select_tokens.h"

namespace livevlm {

struct SelectKernel {
  SelectTokens op;
  int index_bits;                  // that any token index fits into, a multiple of 4
  unsigned long long* thresholds;  // [batch, num_buckets]
  // How many tokens of the bucket have each next digit, and number of the one that is searched for. Only if
  // bucket_capacity > 1.
  uint32_t* digits;  // [batch, 16 * num_buckets + num_buckets]
};

__device__ __forceinline__ int32_t row_length(const SelectTokens& op, int64_t row) {
  const int64_t length = op.seq_lens ? op.seq_lens[row] : op.seq_len;
  return static_cast<int32_t>(max(int64_t{0}, min(length, op.seq_len)));
}

// Larger for a better token; no two are equal.
__device__ __forceinline__ unsigned long long rank_of(uint32_t key, int32_t token) {
  return static_cast<unsigned long long>(key) << 32 | ~static_cast<uint32_t>(token);
}

// The buckets of a thread's tokens, asked for word by word; `num_buckets` or more: in no bucket. Beyond the
// row they mean nothing.
struct GivenBuckets {
  const int32_t* bucket;  // of the thread's next token
  int32_t length;

  // A negative one becomes larger than any num_buckets.
  __device__ __forceinline__ uint32_t next(int32_t token) {
    const bool inside =
        static_cast<uint32_t>(token) < static_cast<uint32_t>(length);  // it may have overflown
    const uint32_t index = inside ? static_cast<uint32_t>(__ldcg(bucket)) : ~0u;
    bucket += 32;
    return index;
  }
};

// By place: token * num_buckets / length, where each token is 32 behind the one before.
class PlaceBuckets {
 public:
  __device__ __forceinline__ PlaceBuckets(int64_t num_buckets, int32_t length, int32_t first)
      : length_(length) {
    const uint64_t place = static_cast<uint64_t>(first) * static_cast<uint64_t>(num_buckets);
    const uint64_t step = 32 * static_cast<uint64_t>(num_buckets);
    bucket_ = static_cast<uint32_t>(place / length_), rest_ = static_cast<uint32_t>(place % length_);
    step_ = static_cast<uint32_t>(step / length_), step_rest_ = static_cast<uint32_t>(step % length_);
  }

  __device__ __forceinline__ uint32_t next(int32_t) {
    const uint32_t bucket = bucket_;
    rest_ += step_rest_;
    const bool carry = rest_ >= length_;
    rest_ -= carry ? length_ : 0;
    bucket_ += step_ + (carry ? 1 : 0);
    return bucket;
  }

 private:
  uint32_t length_, bucket_, rest_, step_, step_rest_;  // length is not 0
};

// Calls body(the buckets of a thread whose first token is `first`).
template <typename Body>
__device__ __forceinline__ void with_buckets(const SelectTokens& op, int64_t row, int32_t length,
                                             int32_t first, Body body) {
  if (op.buckets) {
    body(GivenBuckets{op.buckets + row * op.seq_len + first, length});
  } else {
    body(PlaceBuckets(op.num_buckets, length, first));
  }
}

// How many there are; an int32 is below.
__device__ __forceinline__ uint32_t bucket_count(const SelectTokens& op) {
  return static_cast<uint32_t>(min(op.num_buckets, int64_t{1} << 31));
}

// A token's bucket, and its threshold. That is loaded in any case: no branch keeps the next token waiting.
struct Bucket {
  uint32_t index;
  unsigned long long threshold;

  Bucket() = default;
  __device__ __forceinline__ Bucket(uint32_t index, uint32_t num_buckets,
                                    const unsigned long long* thresholds)
      : index(index), threshold(__ldcg(thresholds + (index < num_buckets ? index : 0))) {}
};

// Each bucket's best token.
template <typename Keys, typename Walk>
__device__ __forceinline__ void best_of_buckets(const Keys& keys, Walk walk, uint32_t num_buckets,
                                                unsigned long long* thresholds) {
  for (uint32_t i = threadIdx.x; i < num_buckets; i += kRowThreads) thresholds[i] = 0;
  __syncthreads();
  keys.template each_with<4>([&](int32_t token) { return walk.next(token); },
                             [&](int32_t token, uint32_t key, auto, uint32_t bucket) {
                               if (key != kNeverKey && bucket < num_buckets)
                                 atomicMax(thresholds + bucket, rank_of(key, token));
                             });
  __syncthreads();
}

// Each bucket's token number `bucket_capacity` in the order of scores, or 0 if it has fewer, is searched for
// digit by digit. This is what is done first for a bucket:
__device__ __forceinline__ void start_search(const SelectKernel& p, uint32_t bucket,
                                             unsigned long long* threshold, uint32_t* counts) {
  *threshold = (1ull << 32) - (1ull << p.index_bits);  // these bits are set in every rank
  counts[int64_t{bucket_count(p.op)} * 16 + bucket] =
      static_cast<uint32_t>(min(p.op.bucket_capacity, int64_t{UINT32_MAX}));
}

// The digits are at 60, 56 .. 32 (key), then from index_bits - 4 down to 0.
__host__ __device__ __forceinline__ int next_shift(int shift, int index_bits) {
  return shift == 32 ? index_bits - 4 : shift - 4;
}

// Counts the digits of those tokens whose higher digits are their bucket's.
template <typename Keys, typename Walk>
__device__ __forceinline__ void count_digits(const Keys& keys, Walk walk, uint32_t num_buckets, int shift,
                                             const unsigned long long* thresholds, uint32_t* counts) {
  keys.template each_with<2>([&](int32_t token) { return Bucket(walk.next(token), num_buckets, thresholds); },
                             [&](int32_t token, uint32_t key, auto, const Bucket& bucket) {
                               if (key == kNeverKey || bucket.index >= num_buckets) return;
                               const unsigned long long rank = rank_of(key, token);
                               // Digits above this one must be those of the threshold. A shift by 60 + 4 bits
                               // is undefined.
                               const bool same = shift == 60 || (rank ^ bucket.threshold) >> (shift + 4) == 0;
                               if (same)
                                 atomicAdd(counts + int64_t{bucket.index} * 16 + (rank >> shift & 15), 1u);
                             });
}

// Adds a bucket's digit to its threshold.
__device__ __forceinline__ void find_digit(uint32_t bucket, uint32_t num_buckets, int shift,
                                           unsigned long long* threshold, uint32_t* counts) {
  uint32_t* wanted = counts + int64_t{num_buckets} * 16 + bucket;
  uint32_t rest = __ldcg(wanted);
  if (rest == 0) return;  // known already
  const uint32_t* own = counts + int64_t{bucket} * 16;
  int digit = 15;
  while (digit >= 0 && __ldcg(own + digit) < rest) rest -= __ldcg(own + digit--);
  // Too few tokens: all of them come by the bucket. That shows at the first digit.
  *threshold = digit < 0 ? 0 : __ldcg(threshold) | static_cast<unsigned long long>(digit) << shift;
  *wanted = digit < 0 ? 0 : rest;
}

// The whole search, by one block.
template <typename Keys, typename Walk>
__device__ __forceinline__ void last_of_buckets(const SelectKernel& p, const Keys& keys, const Walk& walk,
                                                unsigned long long* thresholds, uint32_t* counts) {
  const uint32_t num_buckets = bucket_count(p.op);
  for (uint32_t i = threadIdx.x; i < num_buckets; i += kRowThreads) {
    start_search(p, i, thresholds + i, counts);
  }
  for (int shift = 60; shift >= 0; shift = next_shift(shift, p.index_bits)) {
    for (int64_t i = threadIdx.x; i < int64_t{num_buckets} * 16; i += kRowThreads) counts[i] = 0;
    __syncthreads();
    count_digits(keys, walk, num_buckets, shift, thresholds, counts);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < num_buckets; i += kRowThreads) {
      find_digit(i, num_buckets, shift, thresholds + i, counts);
    }
    __syncthreads();
  }
}

}  // namespace livevlm
