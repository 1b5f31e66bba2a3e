// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of `select_tokens`: one thread block a row.
//
// The greedy walk of Vision Sink Bucketing takes a token by its score alone (first), else if fewer than
// bucket_capacity tokens of its bucket come before it (second), else if budget is left (third). Which tokens
// are second depends on their bucket alone, so all phases are searches for a cut in the order of scores.
#pragma once

#include "common/dtype.h"
#include "kv_evict/select_tokens.h"
#include "kv_evict/top_tokens.cuh"

namespace livevlm {

struct SelectKernel {
  SelectTokens op;
  int index_bits;  // that any token index fits into, a multiple of 4
  // Scratch of each row. A bucket's threshold is the worst of its tokens that come by it; the search for it
  // counts in `digits` how many tokens of the bucket have each next digit.
  unsigned long long* thresholds;  // [batch, num_buckets]
  uint32_t* second;                // [batch, words]: flags
  uint32_t* digits;                // [batch, num_buckets, 16 + 1], only if bucket_capacity > 1
  int64_t words;
};

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

// Each bucket's token number `capacity` in the order of scores, digit by digit; 0 if it has fewer.
template <typename Keys, typename Walk>
__device__ __forceinline__ void last_of_buckets(const Keys& keys, const Walk& walk, uint32_t num_buckets,
                                                uint32_t capacity, int index_bits,
                                                unsigned long long* thresholds, uint32_t* counts) {
  uint32_t* wanted = counts + int64_t{num_buckets} * 16;
  for (uint32_t i = threadIdx.x; i < num_buckets; i += kRowThreads) {
    thresholds[i] = (1ull << 32) - (1ull << index_bits);  // these bits are set in every rank
    wanted[i] = capacity;
  }
  for (int shift = 60; shift >= 0; shift = shift == 32 ? index_bits - 4 : shift - 4) {
    for (int64_t i = threadIdx.x; i < int64_t{num_buckets} * 16; i += kRowThreads) counts[i] = 0;
    __syncthreads();
    Walk own = walk;
    keys.template each_with<2>(
        [&](int32_t token) { return Bucket(own.next(token), num_buckets, thresholds); },
        [&](int32_t token, uint32_t key, auto, const Bucket& bucket) {
          if (key == kNeverKey || bucket.index >= num_buckets) return;
          const unsigned long long rank = rank_of(key, token);
          // Digits above this one must be those of the threshold. A shift by 60 + 4 bits is undefined.
          const bool same = shift == 60 || (rank ^ bucket.threshold) >> (shift + 4) == 0;
          if (same) atomicAdd(counts + int64_t{bucket.index} * 16 + (rank >> shift & 15), 1u);
        });
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < num_buckets; i += kRowThreads) {
      uint32_t rest = __ldcg(wanted + i);
      if (rest == 0) continue;  // known already
      const uint32_t* own = counts + int64_t{i} * 16;
      int digit = 15;
      while (digit >= 0 && __ldcg(own + digit) < rest) rest -= __ldcg(own + digit--);
      // Too few tokens: all of them come by the bucket. That shows at the first digit.
      thresholds[i] =
          digit < 0 ? 0 : __ldcg(thresholds + i) | static_cast<unsigned long long>(digit) << shift;
      wanted[i] = digit < 0 ? 0 : rest;
    }
    __syncthreads();
  }
}

// Notes which tokens are second; returns how many.
template <typename Keys, typename Walk, typename Flags>
__device__ __forceinline__ uint32_t mark_second(const Keys& keys, Walk walk, uint32_t num_buckets,
                                                const Cut& first, const unsigned long long* thresholds,
                                                Flags& second, TopShared& shared) {
  uint32_t count = 0;
  keys.template each_with<4>([&](int32_t token) { return Bucket(walk.next(token), num_buckets, thresholds); },
                             [&](int32_t token, uint32_t key, auto j, const Bucket& bucket) {
                               const bool is_second = (bucket.index < num_buckets) & (key != kNeverKey) &
                                                      !first.takes(key, token) &
                                                      (rank_of(key, token) >= bucket.threshold);
                               second.set(j, is_second);
                               count += is_second ? 1 : 0;
                             });
  return sum_over_warps(count, shared).total;
}

// Finds the thresholds, then the second; returns how many they are.
template <typename Keys, typename Walk, typename Flags>
__device__ __forceinline__ uint32_t find_second(const SelectKernel& p, int64_t row, const Keys& keys,
                                                const Walk& walk, const Cut& first, Flags& second,
                                                TopShared& shared) {
  const auto num_buckets =
      static_cast<uint32_t>(min(p.op.num_buckets, int64_t{1} << 31));  // an int32 is below
  unsigned long long* thresholds = p.thresholds + row * p.op.num_buckets;
  if (p.op.bucket_capacity == 1) {
    best_of_buckets(keys, walk, num_buckets, thresholds);
  } else {
    const auto capacity = static_cast<uint32_t>(min(p.op.bucket_capacity, int64_t{UINT32_MAX}));
    last_of_buckets(keys, walk, num_buckets, capacity, p.index_bits, thresholds,
                    p.digits + row * p.op.num_buckets * 17);
  }
  return mark_second(keys, walk, num_buckets, first, thresholds, second, shared);
}

template <typename T, bool kStaged>
__global__ void __launch_bounds__(kRowThreads, 1)
    select_tokens_kernel(const __grid_constant__ SelectKernel p) {
  LIVEVLM_DYNAMIC_SHARED(TopShared, top);  // and the keys behind it
  TopShared& shared = *top;
  const SelectTokens& op = p.op;
  const int64_t row = blockIdx.x;
  const int64_t wanted = op.seq_lens ? op.seq_lens[row] : op.seq_len;
  const auto length = static_cast<int32_t>(max(int64_t{0}, min(wanted, op.seq_len)));
  const auto budget = static_cast<uint32_t>(op.budget);

  const T* scores = static_cast<const T*>(op.scores) + row * op.stride_batch;
  const auto key_of = [scores, stride = op.stride_token](int32_t token) {
    return score_key(static_cast<float>(__ldg(scores + int64_t{token} * stride)));
  };
  const RowKeys<kStaged, decltype(key_of)> keys(length, key_of, reinterpret_cast<uint32_t*>(&shared + 1));
  const auto own_key = [](int32_t, uint32_t key, auto) { return key; };

  const auto num_top = static_cast<uint32_t>(min(op.num_top, op.budget));
  const Cut first = find_cut(keys, num_top, true, budget, shared, own_key);
  const uint32_t rest = budget - static_cast<uint32_t>(first.taken);
  int32_t count;
  if (rest == 0 || first.key == kNeverKey) {  // the budget is used up, or every token with a score is in
    count = write_indices(
        keys, op.budget, op.indices + row * op.budget, shared,
        [&](int32_t token, uint32_t key, auto) { return key != kNeverKey && first.takes(key, token); });
  } else {
    RowFlags<kStaged> second(length, p.second + row * p.words);
    uint32_t num_second;
    if (op.buckets) {
      const GivenBuckets walk{op.buckets + row * op.seq_len + keys.token(0), length};
      num_second = find_second(p, row, keys, walk, first, second, shared);
    } else {
      const PlaceBuckets walk(op.num_buckets, length, keys.token(0));
      num_second = find_second(p, row, keys, walk, first, second, shared);
    }
    // One class is cut: the second if it is too many, else the third.
    const bool fill = num_second < rest;
    const Cut cut = find_cut(keys, fill ? rest - num_second : rest, false, budget, shared,
                             [&](int32_t token, uint32_t key, auto j) {
                               const bool candidate = second[j] != fill && !first.takes(key, token);
                               return candidate ? key : kNeverKey;
                             });
    count = write_indices(
        keys, op.budget, op.indices + row * op.budget, shared, [&](int32_t token, uint32_t key, auto j) {
          if (key == kNeverKey) return false;
          return first.takes(key, token) || (second[j] != fill ? cut.takes(key, token) : fill);
        });
  }
  if (threadIdx.x == 0) op.counts[row] = count;
}

}  // namespace livevlm
