// SPDX-License-Identifier: Apache-2.0
// What key_ring.cuh is for keys and values in bytes: a warp's own ones of quantised pools, 16 at a time.
//
// A step is a half or a quarter of the bytes, so more steps are on their way together: they take as much
// shared memory as two of 16-bit floats. Codes stay codes there. In registers they become halves, which hold
// all of them, two to an instruction; keys are rotated as such, too, with less error than rounding to
// bfloat16 makes. So that products can be of halves whatever the queries are, a power of two brings each
// query's largest element, and another one the largest weight, into range. Scales of fp8 are a key's: those
// of keys go to its logits and those of values to its weights. Pairs of int4's keys are a channel's: those of
// the one or two blocks that a step has keys of come with it. A minimum of values is the same for all
// channels, so what it adds to a row is one number.
#pragma once

#include "block_attention/attend_mma.cuh"
#include "block_attention/codes.cuh"

namespace livevlm {

// Angles as pairs of halves.
__device__ __forceinline__ uint32_t half_angles(const uint4 (&words)[1], int i) {
  const uint4 of = words[0];
  return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w;
}
__device__ __forceinline__ uint32_t half_angles(const uint4 (&words)[2], int i) {
  const float2 two = FloatAngles::two(words, i);
  return narrow_pair(two.x, two.y, TypeTag<__half>{});
}

// The angles of keys lane / 4 and lane / 4 + 8 of a step, brought ahead of the products.
template <int kDim, typename Angle>
struct CodeAngles {
  static constexpr bool kRotates = true;
  Angles8<Angle> of[2][kDim / 64];

  template <typename Ring>
  __device__ __forceinline__ void load(const Ring& ring, int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t row = ring.angle_row(step, i);
#pragma unroll
      for (int j = 0; j < kDim / 64; ++j)
        of[i][j].load(ring.p.op, row, Ring::first_dim(static_cast<int>(threadIdx.x), j));
    }
  }
};

template <int kDim>
struct CodeAngles<kDim, NoAngles> {
  static constexpr bool kRotates = false;
  template <typename Ring>
  __device__ __forceinline__ void load(const Ring&, int) {}
};

// kRing: steps; kBlocksAtOnce: thread blocks of a multiprocessor.
template <int kHeadDim, typename Format, int kRing, int kBlocksAtOnce>
struct CodeRing {
  static constexpr int kBlocks = kBlocksAtOnce;
  using T = __half;
  using Sums = RowSums<__half, kHeadDim, Format::kBits == 4 ? CodeSums::kPowerAndOffset : CodeSums::kPower>;
  static constexpr int kDim = kHeadDim;
  static constexpr bool kInt4 = Format::kBits == 4;
  static constexpr int kRow = kDim * Format::kBits / 8;  // bytes
  // Of a step: codes of keys, of values; pairs of two blocks' channels; angles, scales.
  static constexpr int kValues = kStepKeys * kRow, kPairs = 2 * kValues, kPairBytes = kInt4 ? kDim * 4 : 0;
  static constexpr int kPlaces = kPairs + 2 * kPairBytes, kKeyScales = kPlaces + kStepKeys * 4;
  static constexpr int kValueScales = kKeyScales + kStepKeys * 4;
  static constexpr int kStepBytes = kValueScales + kStepKeys * 8;  // a multiple of 256
  static constexpr int kSteps = kRing, kBytes = kSteps * kStepBytes;
  static constexpr uint32_t kPieces = kRow / 16, kRows = 32 / kPieces;  // of a row; of a warp at once
  static constexpr int kWords = kDim / 64;  // eights of channels that a lane has in each half of a key
  static_assert(kStepBytes % 128 == 0 && kPieces * kRows == 32, "whole pieces, aligned");

  const AttentionKernel& p;
  const int32_t* table;
  const uint8_t *k, *v;  // of the head, and the lane's piece of a row
  char* memory;          // of the warp
  int64_t head;
  int32_t begin, end;  // of the keys that are seen
  KeyPlace own;        // key lane % 16 of the next step to be brought
  float factors[2];    // of logits, of the thread's two rows

  __device__ __forceinline__ CodeRing(const AttentionKernel& p, const RowTile& tile, int64_t head,
                                      int32_t end, char* memory)
      : p(p),
        table(table_of(p.op, tile.sequence.index, head)),
        k(static_cast<const uint8_t*>(p.op.k.data) + head * p.op.k.stride_head + threadIdx.x % kPieces * 16),
        v(static_cast<const uint8_t*>(p.op.v.data) + head * p.op.v.stride_head + threadIdx.x % kPieces * 16),
        memory(memory),
        head(head),
        begin(tile.keys.begin),
        end(end) {
    asm volatile("" : "+l"(k), "+l"(v));  // computed once
  }

  static __device__ __forceinline__ int after(int step) { return step + 1 == kSteps ? 0 : step + 1; }

  // The first channel of word i of a key, or a query, that a lane has: the halves of a row are kWords words.
  static __device__ __forceinline__ int first_dim(int lane, int i) {
    return lane % 4 * (kDim / 8) + i % kWords * 8 + i / kWords * (kDim / 2);
  }

  // Brings the first steps; then look_ahead().
  __device__ __forceinline__ void start(int32_t key) {
    KeyPlace places[kSteps - 1];
#pragma unroll
    for (int i = 0; i < kSteps - 1; ++i) places[i] = find(key + i * kStepKeys);
#pragma unroll
    for (int i = 0; i < kSteps - 1; ++i) {
      own = places[i];
      bring(i, key + i * kStepKeys);
      cp_async_commit();
    }
    __syncwarp();  // where the first keys lie is there
  }
  __device__ __forceinline__ void look_ahead(int32_t key) { own = find(key + (kSteps - 1) * kStepKeys); }

  // Once this returns, `step` is there, whose first key is `key`; a later one is on its way.
  __device__ __forceinline__ void turn(int step, int32_t key) {
    cp_async_wait<kSteps - 2>();
    __syncwarp();  // all lanes' pieces are there, and all lanes are done with the step before
    bring(step == 0 ? kSteps - 1 : step - 1, key + (kSteps - 1) * kStepKeys);
    cp_async_commit();
    look_ahead(key + kStepKeys);
  }

  __device__ __forceinline__ uint32_t present_at(int step) const {
    return __ballot_sync(~0u, places(step)[lane_again() % kStepKeys] >= 0) & 0xffff;
  }
  // Of key lane / 4 + 8 i.
  __device__ __forceinline__ int32_t angle_row(int step, int i) const {
    if (kSteps == 2) __syncwarp();  // it was written in this turn
    return max(places(step)[lane_again() / 4 + i * 8], 0);
  }

  // As halves, times a power of two: the largest element is 2^10 to 2^11.
  template <typename Angle>
  __device__ __forceinline__ void load_queries(const RowTile& tile, int64_t head, uint4 (&words)[kDim / 32]) {
    p.op.dtype == DType::kBFloat16 ? halves_of<Angle, __nv_bfloat16>(tile, head, words)
                                   : halves_of<Angle, __half>(tile, head, words);
  }

  // Keys lane / 4 and lane / 4 + 8, rotated, as pieces of 8 elements: see first_dim().
  template <typename Angles>
  __device__ __forceinline__ void keys(int step, int32_t key, const Angles& angles, uint4 (&upper)[kDim / 32],
                                       uint4 (&lower)[kDim / 32]) const {
    if constexpr (kInt4) {
      int4_keys(step, key, upper, lower);
    } else {
      fp8_key(step, 0, upper);
      fp8_key(step, 1, lower);
    }
    rotate(angles, 0, upper);
    rotate(angles, 1, lower);
  }

  __device__ __forceinline__ void scale(int step, float (&logits)[4]) const {
    const auto* const scales = reinterpret_cast<const float*>(at(step, kKeyScales)) + lane_again() / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[j] *= kInt4 ? factors[j % 2] : factors[j % 2] * scales[j / 2 * 8];
  }

  __device__ __forceinline__ void add(Sums& sums, const float (&weights)[4], int step) const;

 private:
  __device__ __forceinline__ char* at(int step, int offset) const {
    return memory + step * kStepBytes + offset;
  }
  __device__ __forceinline__ const int32_t* places(int step) const {  // rows of angles; -1: nothing there
    return reinterpret_cast<const int32_t*>(at(step, kPlaces));
  }
  __device__ __forceinline__ KeyPlace find(int32_t first) const {
    const int32_t key = first + static_cast<int>(threadIdx.x) % kStepKeys;
    return key < begin ? KeyPlace{-1, 0, 0} : place_of(p, table, key, end);
  }

  // Threads that read at once must find different banks: of keys, eight threads with 16 bytes or sixteen with
  // eight have four, or two, neighbouring pieces of rows; of values, sixteen have eight bytes, two
  // neighbouring pieces of every second row, which therefore lie beside each other if rows are short.
  static __device__ __forceinline__ uint32_t key_offset(uint32_t row, uint32_t piece) {
    const uint32_t turned = kPieces == 8 ? (row & 1) << 2 : kPieces == 4 ? row & 2 : 0;
    return row * kRow + (piece ^ turned) * 16;
  }
  static __device__ __forceinline__ uint32_t value_offset(uint32_t row, uint32_t piece) {
    const uint32_t place = (row & 8) | (row & 1) << 2 | (row & 6) >> 1;
    const uint32_t turned = kPieces == 8 ? (place & 3) << 1 : kPieces == 4 ? place & 2 : 0;
    return place * kRow + (piece ^ turned) * 16;
  }
  // Keys of a step before this one are of its first block.
  __device__ __forceinline__ uint32_t of_first_block(int32_t key) const {
    const auto number = static_cast<uint32_t>(key);
    return p.block_size.value - (number - p.block_size.quotient(number) * p.block_size.value);
  }

  // Brings the keys last looked up. Those that are not there become zeros, as do their scales; what is in
  // their place is not read.
  __device__ __forceinline__ void bring(int step, int32_t key) {
    const uint32_t lane = lane_again(), piece = lane % kPieces;
    const bool own_there = own.block >= 0;
    const auto block = static_cast<uint32_t>(own_there ? own.block : 0);
    const auto slot = static_cast<uint32_t>(own_there ? own.slot : 0);
    const uint32_t own_k = own_there ? block * p.k_block + slot * p.k_slot : KeyPieces::kNothing;
    const uint32_t own_v = block * p.v_block + slot * p.v_slot;
#pragma unroll
    for (uint32_t i = 0; i < kStepKeys / kRows; ++i) {
      const uint32_t row = i * kRows + lane / kPieces;
      const uint32_t at_k = __shfl_sync(~0u, own_k, row), at_v = __shfl_sync(~0u, own_v, row);
      const bool there = at_k != KeyPieces::kNothing;
      cp_async16(at(step, key_offset(row, piece)), k + uint64_t{there ? at_k : 0} * 16, there);
      cp_async16(at(step, kValues + value_offset(row, piece)), v + uint64_t{at_v} * 16, there);
    }
    const uint32_t mine = lane % kStepKeys;
    if (lane < kStepKeys) reinterpret_cast<int32_t*>(at(step, kPlaces))[mine] = own_there ? own.angles : -1;
    if constexpr (kInt4) {
      if (lane < kStepKeys)
        cp_async4(at(step, kValueScales + mine * 4),
                  static_cast<const __half*>(p.op.v_scale) + scale_at(p.op, false, block, slot, head),
                  own_there);
      const uint32_t bits = __ballot_sync(~0u, own_there) & 0xffff, first = of_first_block(key);
      const uint32_t of_first = first < kStepKeys ? bits & ((1u << first) - 1) : bits;
      bring_pairs(step, 0, of_first, true);
      bring_pairs(step, 1, bits & ~of_first, first < kStepKeys);
    } else {
      const void* const scales = lane < kStepKeys ? p.op.k_scale : p.op.v_scale;
      cp_async4(at(step, (lane < kStepKeys ? kKeyScales : kValueScales) + mine * 4),
                static_cast<const float*>(scales) + scale_at(p.op, true, block, slot, head), own_there);
    }
  }

  // The pairs of the block that these keys of the step are of; there may be none.
  __device__ __forceinline__ void bring_pairs(int step, int which, uint32_t keys, bool wanted) const {
    const int32_t block = __shfl_sync(~0u, own.block, keys ? __ffs(static_cast<int>(keys)) - 1 : 0);
    constexpr uint32_t kAll = kDim / 4;
    const uint32_t piece = lane_again();
    if (!wanted || (kAll < 32 && piece >= kAll)) return;
    const __half* const pairs =
        static_cast<const __half*>(p.op.k_scale) + scale_at(p.op, true, keys ? block : 0, 0, head);
    cp_async16(at(step, kPairs + which * kPairBytes + piece * 16), pairs + piece * 8, keys != 0);
  }

  __device__ __forceinline__ void fp8_key(int step, int i, uint4 (&words)[kDim / 32]) const {
    const uint32_t lane = lane_again(), row = lane / 4 + i * 8, part = lane % 4;
    uint2 codes[2 * kWords];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kWords == 2) {
        const uint4 both = *reinterpret_cast<const uint4*>(at(step, key_offset(row, part + half * 4)));
        codes[half * 2] = make_uint2(both.x, both.y), codes[half * 2 + 1] = make_uint2(both.z, both.w);
      } else {
        codes[half] =
            *reinterpret_cast<const uint2*>(at(step, key_offset(row, part / 2 + half * 2)) + part % 2 * 8);
      }
    }
#pragma unroll
    for (int j = 0; j < 2 * kWords; ++j) words[j] = widen_e4m3(codes[j]);
  }

  __device__ __forceinline__ void int4_keys(int step, int32_t key, uint4 (&upper)[kDim / 32],
                                            uint4 (&lower)[kDim / 32]) const {
    const uint32_t lane = lane_again(), part = lane % 4, first = of_first_block(key);
    uint32_t codes[2][2 * kWords];
    const uint4* pairs_of[2];  // of the lane's channels in the first half
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t row = lane / 4 + i * 8;
      pairs_of[i] =
          reinterpret_cast<const uint4*>(at(step, kPairs + (row >= first ? kPairBytes : 0))) + part * kWords;
      if constexpr (kWords == 2) {
        const uint4 four = *reinterpret_cast<const uint4*>(at(step, key_offset(row, part)));
        codes[i][0] = four.x, codes[i][1] = four.y, codes[i][2] = four.z, codes[i][3] = four.w;
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(at(step, key_offset(row, part / 2)) + part % 2 * 8);
        codes[i][0] = two.x, codes[i][1] = two.y;
      }
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) {  // eight channels of each half
      constexpr int kHalf = kDim / 16, kMinima = kDim / 8;
      uint4 scales[2], minima[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i == 0 || first < kStepKeys) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            scales[half] = pairs_of[i][j + half * kHalf];
            minima[half] = pairs_of[i][j + half * kHalf + kMinima];
          }
        }
        auto& words = i == 0 ? upper : lower;
        uint32_t spread[4];
#pragma unroll
        for (int m = 0; m < 4; ++m)
          spread[m] = __byte_perm(codes[i][2 * j + m / 2], 0, m % 2 ? 0x4342 : 0x4140);
        words[j] = make_uint4(fma2(low_steps<0>(spread[0]), scales[0].x, minima[0].x),
                              fma2(low_steps<0>(spread[1]), scales[0].y, minima[0].y),
                              fma2(low_steps<0>(spread[2]), scales[0].z, minima[0].z),
                              fma2(low_steps<0>(spread[3]), scales[0].w, minima[0].w));
        words[j + kWords] = make_uint4(fma2(high_steps<0>(spread[0]), scales[1].x, minima[1].x),
                                       fma2(high_steps<0>(spread[1]), scales[1].y, minima[1].y),
                                       fma2(high_steps<0>(spread[2]), scales[1].z, minima[1].z),
                                       fma2(high_steps<0>(spread[3]), scales[1].w, minima[1].w));
      }
    }
  }

  template <typename Angles>
  __device__ __forceinline__ void rotate(const Angles& angles, int i, uint4 (&words)[kDim / 32]) const {
    if constexpr (Angles::kRotates) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        uint32_t* const lows[4] = {&words[j].x, &words[j].y, &words[j].z, &words[j].w};
        uint32_t* const highs[4] = {&words[j + kWords].x, &words[j + kWords].y, &words[j + kWords].z,
                                    &words[j + kWords].w};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const uint32_t c = half_angles(angles.of[i][j].cosine, m), s = half_angles(angles.of[i][j].sine, m);
          const uint32_t a = *lows[m], b = *highs[m];
          *lows[m] = difference2(a, c, b, s);
          *highs[m] = fma2(b, c, mul2(a, s));
        }
      }
    }
  }

  template <typename Angle, typename Query>
  __device__ __forceinline__ void halves_of(const RowTile& tile, int64_t head, uint4 (&words)[kDim / 32]) {
    load_query<Query, kDim, Angle, CodeRing>(p, tile, head, words);
    const auto each = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) f(words[i].x), f(words[i].y), f(words[i].z), f(words[i].w);
    };
    uint32_t most = 0;  // bits of the largest magnitude
    each([&](uint32_t word) {
      const float2 two = widen_pair(word, TypeTag<Query>{});
      most = max(most, max(__float_as_uint(two.x) & 0x7fffffffu, __float_as_uint(two.y) & 0x7fffffffu));
    });
    most = max(most, __shfl_xor_sync(~0u, most, 1));
    most = max(most, __shfl_xor_sync(~0u, most, 2));
    const float power =
        __uint_as_float(static_cast<uint32_t>(min(253, 264 - static_cast<int>(most >> 23))) << 23);
    each([&](uint32_t& word) {
      const float2 two = widen_pair(word, TypeTag<Query>{});
      word = narrow_pair(two.x * power, two.y * power, TypeTag<__half>{});
    });
    const float own = p.scale / power;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      factors[j] = __shfl_sync(~0u, own, (static_cast<int>(threadIdx.x) % 4 * 2 + j) * 4);
  }

  // Channels lane / 4 * 8 to + 7, from 64 `half` on, of the values of keys lane % 4 * 2 + {0, 1, 8, 9}; of
  // int4 both halves' in one.
  __device__ __forceinline__ void values(int step, int half, uint2 (&words)[4]) const {
    const uint32_t lane = lane_again();
    const uint32_t eight = kInt4 ? lane / 4 % (kRow / 8) : lane / 4 + static_cast<uint32_t>(half) * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = lane % 4 * 2 + i % 2 + i / 2 * 8;
      words[i] =
          *reinterpret_cast<const uint2*>(at(step, kValues + value_offset(row, eight / 2)) + eight % 2 * 8);
    }
  }
};

}  // namespace livevlm
