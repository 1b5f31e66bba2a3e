// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `select_tokens`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
//
// Plain top-k finds the score of the last token taken, digit by digit. Where buckets have a say the tokens
// are radix-sorted, and the docstring's greedy walk runs as it stands. Both take time linear in seq_len.
#include "common/cpu_lanes.h"
#include "common/parallel.h"
#include "kv_evict/select_tokens.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

constexpr int kDigitBits = 11, kDigits = 3;  // of a 32-bit key
constexpr uint32_t kRadix = 1u << kDigitBits, kDigitMask = kRadix - 1;
constexpr uint32_t kNever = 0;  // the key of -inf, NaN and what lies beyond the length; below all others
constexpr uint32_t kAlways = 0xff800000u;  // the key of +inf

struct Entry {
  uint32_t key;
  int32_t token;
};

struct Workspace {
  explicit Workspace(int64_t seq_len)
      : keys(seq_len),
        order(seq_len),
        spare(seq_len),
        bucket(seq_len),
        held(seq_len + 1),
        taken(seq_len),
        histogram(kDigits * kRadix) {}
  Scratch<uint32_t> keys;
  Scratch<Entry> order, spare;
  Scratch<int32_t> bucket, held;
  Scratch<bool> taken;
  Scratch<int32_t> histogram;
};

void fill(int32_t* data, int64_t count, int32_t value) {
  for (int64_t i = 0; i < count; ++i) data[i] = value;
}

// Keys order as scores do, and 0.0 and -0.0 have the same one.
uint32_t key_of(float score) {
  const uint32_t bits = float_to_bits(score + 0.0f);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return score > -kInfinity ? key : kNever;  // false for NaN
}

// Sorts the first `count` entries of w.order, highest key first; equals stay in order. Overwrites w.spare.
void sort(Workspace& w, int64_t count) {
  int32_t* histogram = w.histogram;
  Entry *from = w.order, *to = w.spare;
  fill(histogram, kDigits * kRadix, 0);
  for (int64_t i = 0; i < count; ++i) {
    for (uint32_t digit = 0; digit < kDigits; ++digit)
      ++histogram[digit * kRadix + (from[i].key >> digit * kDigitBits & kDigitMask)];
  }
  for (uint32_t digit = 0; digit < kDigits; ++digit) {
    int32_t* place = histogram + digit * kRadix;
    if (count == 0 || place[from[0].key >> digit * kDigitBits & kDigitMask] == count) continue;
    int32_t start = 0;
    for (uint32_t value = kRadix; value-- > 0;) {
      const int32_t size = place[value];
      place[value] = start;
      start += size;
    }
    for (int64_t i = 0; i < count; ++i) to[place[from[i].key >> digit * kDigitBits & kDigitMask]++] = from[i];
    Entry* other = from;
    from = to;
    to = other;
  }
  if (from == w.order) return;
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Marks the `budget` highest keys; more than that are not kNever.
void take_top(Workspace& w, int64_t length, int64_t budget) {
  int64_t rest = budget;  // to take among the keys that begin with `prefix`
  uint32_t prefix = 0;
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    const int shift = digit * kDigitBits;
    fill(w.histogram, kRadix, 0);
    for (int64_t i = 0; i < length; ++i) {
      // In 64 bits: the first digit has no prefix above it.
      if (uint64_t{w.keys[i]} >> (shift + kDigitBits) == prefix)
        ++w.histogram[w.keys[i] >> shift & kDigitMask];
    }
    uint32_t value = kDigitMask;
    while (w.histogram[value] < rest) rest -= w.histogram[value--];
    prefix = prefix << kDigitBits | value;
  }
  for (int64_t i = 0; i < length; ++i) {
    w.taken[i] = w.keys[i] > prefix || (w.keys[i] == prefix && rest > 0);
    rest -= w.keys[i] == prefix;
  }
}

// Fills w.bucket with the bucket of each token, -1 for none; returns how many there are at most.
int64_t find_buckets(const SelectTokens& p, Workspace& w, int64_t batch, int64_t length) {
  if (!p.buckets) {
    // With more buckets than tokens every token has one of its own.
    const int64_t num_buckets = p.num_buckets < length ? p.num_buckets : length;
    for (int64_t i = 0; i < length; ++i) w.bucket[i] = static_cast<int32_t>(i * num_buckets / length);
    return num_buckets;
  }
  const int32_t* given = p.buckets + batch * p.seq_len;
  for (int64_t i = 0; i < length; ++i)
    w.bucket[i] = given[i] >= 0 && given[i] < p.num_buckets ? given[i] : -1;
  if (p.num_buckets <= length) return p.num_buckets;
  // Most buckets are empty: number those that are not, so that memory does not grow with num_buckets.
  for (int64_t i = 0; i < length; ++i)
    w.order[i] = {static_cast<uint32_t>(w.bucket[i]), static_cast<int32_t>(i)};
  sort(w, length);
  int32_t number = -1;
  for (int64_t i = 0; i < length; ++i) {
    const auto [key, token] = w.order[i];
    number += i == 0 || key != w.order[i - 1].key;
    if (w.bucket[token] >= 0) w.bucket[token] = number;
  }
  return number + 1;
}

// Marks `budget` of the `eligible` tokens, which are more.
void walk(const SelectTokens& p, Workspace& w, int64_t batch, int64_t length, int64_t eligible) {
  fill(w.held, find_buckets(p, w, batch, length), 0);
  int64_t count = 0, always = 0;
  for (int64_t i = 0; i < length; ++i) {
    w.taken[i] = false;
    if (w.keys[i] == kNever) continue;
    w.order[count++] = {w.keys[i], static_cast<int32_t>(i)};
    always += w.keys[i] == kAlways;
  }
  sort(w, eligible);
  const int64_t num_top = always > p.num_top ? always : p.num_top;
  int64_t rest = p.budget, skipped = 0;
  for (int64_t i = 0; i < eligible && rest > 0; ++i) {
    const int32_t token = w.order[i].token, bucket = w.bucket[token];
    const bool fits = i < num_top || (bucket >= 0 && w.held[bucket] < p.bucket_capacity);
    if (fits) {
      w.taken[token] = true;
      --rest;
      if (bucket >= 0) ++w.held[bucket];
    } else {
      w.spare[skipped++].token = token;
    }
  }
  for (int64_t i = 0; i < rest; ++i) w.taken[w.spare[i].token] = true;
}

template <typename T>
void one_row(const SelectTokens& p, Workspace& w, int64_t batch) {
  int64_t length = p.seq_lens ? p.seq_lens[batch] : p.seq_len;
  length = length < 0 ? 0 : length < p.seq_len ? length : p.seq_len;
  const T* scores = static_cast<const T*>(p.scores) + batch * p.stride_batch;
  int64_t eligible = 0;
  for (int64_t i = 0; i < length; ++i) w.keys[i] = key_of(to_float(scores[i * p.stride_token]));
  for (int64_t i = 0; i < length; ++i) eligible += w.keys[i] != kNever;

  if (eligible <= p.budget) {
    for (int64_t i = 0; i < length; ++i) w.taken[i] = w.keys[i] != kNever;
  } else if (p.num_top >= p.budget) {
    take_top(w, length, p.budget);
  } else {
    walk(p, w, batch, length, eligible);
  }
  int32_t* indices = p.indices + batch * p.budget;
  int64_t count = 0;
  for (int64_t i = 0; i < length; ++i) {
    if (w.taken[i]) indices[count++] = static_cast<int32_t>(i);
  }
  p.counts[batch] = static_cast<int32_t>(count);
  fill(indices + count, p.budget - count, -1);
}

}  // namespace

void select_tokens_cpu(const SelectTokens& params) {
  constexpr int64_t kGrain = 8192;  // tokens worth waking a thread for
  dispatch_float(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, params.batch, kGrain / (params.seq_len + 1) + 1, [&](int64_t first, int64_t last) {
      Workspace workspace(params.seq_len);
      for (int64_t batch = first; batch < last; ++batch) one_row<T>(params, workspace, batch);
    });
  });
}

}  // namespace livevlm::LIVEVLM_CPU
