// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of `select_tokens` for rows whose keys fit into shared memory: one thread block a row. Longer
// rows: select_long_rows.cuh.
//
// The greedy walk of Vision Sink Bucketing takes a token by its score alone (first), else if fewer than
// bucket_capacity tokens of its bucket come before it (second), else if budget is left (third). Which tokens
// are second depends on their bucket alone, so all phases are searches for a cut in the order of scores.
#pragma once

#include "kv_evict/bucket_thresholds.cuh"
#include "kv_evict/top_tokens.cuh"

namespace livevlm {

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
  const uint32_t num_buckets = bucket_count(p.op);
  unsigned long long* thresholds = p.thresholds + row * p.op.num_buckets;
  if (p.op.bucket_capacity == 1) {
    best_of_buckets(keys, walk, num_buckets, thresholds);
  } else {
    last_of_buckets(p, keys, walk, thresholds, p.digits + row * p.op.num_buckets * 17);
  }
  return mark_second(keys, walk, num_buckets, first, thresholds, second, shared);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, 1)
    select_tokens_kernel(const __grid_constant__ SelectKernel p) {
  LIVEVLM_DYNAMIC_SHARED(TopShared, top);  // and the keys behind it
  TopShared& shared = *top;
  const SelectTokens& op = p.op;
  const int64_t row = blockIdx.x;
  const int32_t length = row_length(op, row);
  const auto budget = static_cast<uint32_t>(op.budget);

  const T* scores = static_cast<const T*>(op.scores) + row * op.stride_batch;
  const auto key_of = [scores, stride = op.stride_token](int32_t token) {
    return score_key(static_cast<float>(__ldg(scores + int64_t{token} * stride)));
  };
  const RowKeys<true, decltype(key_of)> keys(length, key_of, reinterpret_cast<uint32_t*>(&shared + 1));
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
    RowFlags<true> second(length, nullptr);
    uint32_t num_second = 0;
    with_buckets(op, row, length, keys.token(0), [&](const auto& walk) {
      num_second = find_second(p, row, keys, walk, first, second, shared);
    });
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
