// SPDX-License-Identifier: Apache-2.0
// Rows that several thread blocks share, a chunk each: what the kernels of select_long_rows.cuh have in
// common.
//
// No block waits for another: launches follow each other. One makes a histogram of a digit over the row; the
// next finds in it what the digit is. Each block finds it for itself, and the first of a row notes it, since
// the launch after needs it too.
#pragma once

#include "kv_evict/bucket_thresholds.cuh"
#include "kv_evict/top_tokens.cuh"

namespace livevlm {

// Two searches of kPasses digits each: for the first, then for those of the others that are cut.
inline constexpr int kSteps = 2 * kPasses;
// Number kPasses is of the second, the one behind it of the third.
inline constexpr int kHistograms = kSteps + 1;
inline constexpr uint32_t kAllTies = ~0u;

// As `Cut`, for a row that no block knows all of: ties are counted from its start.
struct LongCut {
  uint32_t key, known;  // the bits of `key` that are found; all of them once the search has ended
  uint32_t ties;        // how many tokens with just this key, or with these digits, are taken
  uint32_t taken;       // how many that are in all
  uint32_t fill;        // the second are taken, and the cut is among the third
};

struct LongRows {
  SelectKernel select;
  int64_t words;
  uint32_t num_chunks;
  int32_t chunk_tokens;  // a multiple of 32, kMaxStagedWords words of each warp at most
  int step;              // of cuts; that in `select`, a search for thresholds, has its own
  int shift;
  uint32_t* histograms;  // [batch, kHistograms, kDigits], zero at first
  LongCut* cuts;         // [batch, kSteps], cuts[i]: what is known after i + 1 digits
  uint32_t* keys;        // [batch, seq_len]
  // Flags x and y of a token: after counting, is taken, and is a tie, of which some are. After marking,
  // is first, and is second.
  uint2* flags;   // [batch, words]
  uint2* counts;  // [batch, num_chunks]: how many flags x and y a chunk has
};

struct Chunk {
  int64_t row;
  uint32_t index;
  int32_t length;      // of the row
  int32_t begin, end;  // equal, if the row ends before

  __device__ __forceinline__ explicit Chunk(const LongRows& p)
      : row(blockIdx.x / p.num_chunks), index(blockIdx.x % p.num_chunks) {
    length = row_length(p.select.op, row);
    const int64_t first = int64_t{index} * p.chunk_tokens;
    begin = static_cast<int32_t>(first);
    end = static_cast<int32_t>(max(first, min(first + p.chunk_tokens, int64_t{length})));
  }
};

__device__ __forceinline__ auto chunk_keys(const LongRows& p, const Chunk& chunk) {
  const auto key_of = [keys = p.keys + chunk.row * p.select.op.seq_len](int32_t token) {
    return __ldg(keys + token);
  };
  return RowKeys<false, decltype(key_of)>(chunk.end, key_of, nullptr, chunk.begin);
}

__device__ __forceinline__ uint32_t* row_histogram(const LongRows& p, const Chunk& chunk, int number) {
  return p.histograms + (chunk.row * kHistograms + number) * kDigits;
}

__device__ __forceinline__ LongCut with_digit(LongCut cut, const Bin& bin, int pass) {
  cut.key |= bin.digit << digit_shift(pass);
  cut.known |= ~0u << digit_shift(pass);
  cut.ties = bin.rest;
  // All of the bin: lower digits do not matter.
  return bin.rest == bin.size ? LongCut{cut.key, ~0u, kAllTies, cut.taken, cut.fill} : cut;
}

__device__ __forceinline__ LongCut with_first_digit(const Bin& bin, uint32_t count, bool fill) {
  if (bin.total <= count) return {kNeverKey, ~0u, kAllTies, bin.total, fill};
  if (count == 0) return {~0u, ~0u, kAllTies, 0, fill};
  return with_digit({0, 0, count, count, fill}, bin, 0);
}

// What the launches before found out, and the digit that is now known: p.step + 1 digits.
__device__ __forceinline__ LongCut find_step(const LongRows& p, const Chunk& chunk, TopShared& shared) {
  const SelectTokens& op = p.select.op;
  LongCut* cuts = p.cuts + chunk.row * kSteps;
  const auto find = [&](int histogram, int number, uint32_t wanted) {
    return find_bin(row_histogram(p, chunk, histogram), shared.of_warps[number], wanted);
  };
  LongCut cut;
  if (p.step == 0) {
    const uint32_t always = row_histogram(p, chunk, 0)[kAlwaysKey >> 21];
    const auto count = static_cast<uint32_t>(min(max(op.num_top, int64_t{always}), op.budget));
    cut = with_first_digit(find(0, 0, count), count, true);  // nothing is second
  } else if (p.step == kPasses) {
    // One class is cut: the second if it is too many, else the third.
    uint32_t rest = static_cast<uint32_t>(op.budget) - cuts[kPasses - 1].taken;
    Bin bin = find(kPasses, 0, rest);
    const bool fill = bin.total < rest;
    if (fill) {
      rest -= bin.total;
      bin = find(kPasses + 1, 1, rest);
    }
    cut = with_first_digit(bin, rest, fill);
  } else {
    cut = cuts[p.step - 1];
    if (cut.known != ~0u) {
      cut = with_digit(cut, find(p.step < kPasses ? p.step : p.step + 1, 0, cut.ties), p.step % kPasses);
    }
  }
  if (chunk.index == 0 && threadIdx.x == 0) cuts[p.step] = cut;
  return cut;
}

}  // namespace livevlm
