// SPDX-License-Identifier: Apache-2.0
// Long rows: two flags a token, in words of 32 tokens, and how many of them come before.
#pragma once

#include "kv_evict/long_rows.cuh"

namespace livevlm {

__device__ __forceinline__ bool has_bit(uint32_t word) {
  return (word >> row_lane() & 1) != 0;
}

// Which tokens of a word are still in question, and which are taken for sure, in the search of p.step.
struct Candidates {
  uint32_t open, sure;

  __device__ __forceinline__ Candidates(uint2 flags, bool fill)
      : open(fill ? ~(flags.x | flags.y) : flags.y), sure(fill ? flags.x | flags.y : flags.x) {}
};

// The flags of a warp's tokens, a word of each a lane. New ones can be set word by word.
class ChunkFlags {
 public:
  __device__ __forceinline__ ChunkFlags(const LongRows& p, const Chunk& chunk, bool zero)
      : own_{0, 0}, stretch_(row_stretch(chunk.end - chunk.begin)) {
    stretch_.first += static_cast<uint32_t>(chunk.begin) / 32;
    words_ = p.flags + chunk.row * p.words + stretch_.first;
    if (!zero && static_cast<uint32_t>(row_lane()) < stretch_.count) own_ = __ldcg(words_ + row_lane());
  }

  __device__ __forceinline__ uint32_t num_words() const { return stretch_.count; }
  __device__ __forceinline__ int32_t token(uint32_t j) const {
    return static_cast<int32_t>((stretch_.first + j) * 32) + row_lane();
  }
  __device__ __forceinline__ uint2 own() const { return own_; }
  __device__ __forceinline__ uint2 operator[](uint32_t j) const {
    return {__shfl_sync(~0u, own_.x, static_cast<int>(j)), __shfl_sync(~0u, own_.y, static_cast<int>(j))};
  }
  __device__ __forceinline__ void set(uint32_t j, bool x, bool y) {
    const uint32_t votes_x = __ballot_sync(~0u, x), votes_y = __ballot_sync(~0u, y);
    if (row_lane() == 0) words_[j] = {votes_x, votes_y};
  }

 private:
  uint2 own_;
  RowStretch stretch_;
  uint2* words_;
};

// What the counts of a row's chunks add up to: of those before this one, and of all. Every warp adds them.
struct ChunkSums {
  uint2 before, total;

  __device__ __forceinline__ ChunkSums(const LongRows& p, const Chunk& chunk) : before{0, 0}, total{0, 0} {
    const uint2* counts = p.counts + chunk.row * p.num_chunks;
#pragma unroll 4
    for (auto i = static_cast<uint32_t>(row_lane()); i < p.num_chunks; i += 32) {
      const uint2 count = __ldcg(counts + i);
      before.x += i < chunk.index ? count.x : 0, before.y += i < chunk.index ? count.y : 0;
      total.x += count.x, total.y += count.y;
    }
    before = {__reduce_add_sync(~0u, before.x), __reduce_add_sync(~0u, before.y)};
    total = {__reduce_add_sync(~0u, total.x), __reduce_add_sync(~0u, total.y)};
  }
};

// Goes through the words of a warp after count_taken_kernel, and decides the ties: as many as the cut takes,
// from the start of the row.
class TakenWords {
 public:
  __device__ __forceinline__ TakenWords(const ChunkFlags& flags, const ChunkSums& sums, const LongCut& cut,
                                        TopShared& shared)
      : flags_(flags), most_(cut.ties) {
    const auto ones = [](uint32_t word) { return static_cast<uint32_t>(__popc(word)); };
    const uint32_t before = sum_over_warps(ones(flags.own().x) + (ones(flags.own().y) << 16), shared).before;
    ties_ = sums.before.y + (before >> 16);
    number_ = sums.before.x + (before & 0xffff) + min(ties_, most_);
  }

  // Tokens taken before the next word.
  __device__ __forceinline__ uint32_t number() const { return number_; }

  // What is taken of word j; asked for j = 0, 1, ...
  __device__ __forceinline__ uint32_t next(uint32_t j) {
    const uint2 word = flags_[j];
    const uint32_t before = ties_ + static_cast<uint32_t>(__popc(word.y & ((1u << row_lane()) - 1)));
    const uint32_t taken = word.x | __ballot_sync(~0u, has_bit(word.y) && before < most_);
    ties_ += static_cast<uint32_t>(__popc(word.y));
    number_ += static_cast<uint32_t>(__popc(taken));
    return taken;
  }

 private:
  const ChunkFlags& flags_;
  uint32_t most_, ties_, number_;
};

}  // namespace livevlm
