// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of `quantize_blocks`.
//
// A thread block has the keys or the values of one block and head, and reads them once: what a thread needs
// again it keeps, unless blocks are long. A thread owns a column, kSize channels (of int4 those of each half
// that share bytes), of every kTokens-th token; neighbours own neighbouring columns. Minima and maxima do not
// depend on their order, so all backends find the same ones.
#pragma once

#include "block_attention/quantize_blocks.h"
#include "common/cuda_vec.cuh"
#include "common/ptx.cuh"

namespace livevlm {

inline constexpr int kQuantizeThreads = 128, kHeldTokens = 4;

// Nearest, ties to even, up to 448; 0 for NaN.
__device__ __forceinline__ uint32_t e4m3_of(float x) {
  if (!(x == x)) return 0;
  const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u;
  const float magnitude = fminf(__uint_as_float(__float_as_uint(x) & 0x7fffffffu), 448.0f);
  const uint32_t bits = __float_as_uint(magnitude);
  // Below 2^-6, a multiple of 2^-9: adding 2^14, whose last bit is worth just that, rounds.
  if (magnitude < 0.015625f)
    return sign | (__float_as_uint(magnitude + 16384.0f) - __float_as_uint(16384.0f));
  return sign | (((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3));
}

// A number of steps as a code: nearest, ties to even; 0 for NaN.
__device__ __forceinline__ uint32_t int4_of(float steps) {
  return __float_as_uint(fminf(fmaxf(steps, 0.0f), 15.0f) + 8388608.0f) & 15u;
}

// Elements that share a scale.
struct Extremes {
  float low = INFINITY, high = -INFINITY;

  __device__ __forceinline__ void add(float x) { add(x, x); }
  __device__ __forceinline__ void add(float least, float most) {
    low = min_or_nan(low, least);
    high = max_or_nan(high, most);
  }
  __device__ __forceinline__ void add_lane(int apart) {
    const float least = __shfl_xor_sync(~0u, low, apart), most = __shfl_xor_sync(~0u, high, apart);
    add(least, most);
  }
};

// A scale and a minimum, rounded to half precision; zeros if nothing shares them.
struct QuantizedPair {
  float scale, low;

  QuantizedPair() = default;
  __device__ __forceinline__ explicit QuantizedPair(const Extremes& of) {
    const bool none = of.low > of.high;
    scale = __half2float(__float2half_rn(none ? 0.0f : __fdiv_rn(of.high - of.low, 15.0f)));
    low = __half2float(__float2half_rn(none ? 0.0f : of.low));
  }
  __device__ __forceinline__ void write(void* scales, int64_t at, int64_t minimum_at) const {
    static_cast<__half*>(scales)[at] = __float2half_rn(scale);
    static_cast<__half*>(scales)[minimum_at] = __float2half_rn(low);
  }
  __device__ __forceinline__ uint32_t code(float x) const { return int4_of(__fdiv_rn(x - low, scale)); }
};

template <int kSize>
__device__ __forceinline__ void store_codes(uint8_t* target, const uint32_t (&codes)[kSize]) {
  if constexpr (kSize == 1) {
    *target = static_cast<uint8_t>(codes[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; i += 4)
      *reinterpret_cast<uint32_t*>(target + i) =
          codes[i] | codes[i + 1] << 8 | codes[i + 2] << 16 | codes[i + 3] << 24;
  }
}

template <typename T, int kSize, bool kInt4>
struct QuantizedBlock {
  static constexpr int kHalves = kInt4 ? 2 : 1;
  using Row = Vec<T, kSize>[kHalves];

  const QuantizeBlocks& p;
  const QuantizeBlocks::Side& side;
  int64_t number, head, batch, block;  // number: of all layers
  int64_t bytes;                       // of a token: half of its channels, or all
  const T* source;

  __device__ __forceinline__ QuantizedBlock(const QuantizeBlocks& p, const QuantizeBlocks::Side& side,
                                            int64_t unit)
      : p(p), side(side), number(unit / p.num_heads), head(unit - number * p.num_heads) {
    batch = number / p.num_blocks, block = number - batch * p.num_blocks;
    bytes = p.head_dim / kHalves;
    source = static_cast<const T*>(side.data) + batch * side.stride_batch + block * side.stride_block +
             head * side.stride_head;
  }

  __device__ __forceinline__ bool present(int64_t token) const {
    if (token >= p.block_size) return false;
    if (!p.positions) return true;
    const int64_t at = batch * p.positions_batch + block * p.block_size + token;
    return (p.positions_int64 ? static_cast<const int64_t*>(p.positions)[at]
                              : static_cast<const int32_t*>(p.positions)[at]) >= 0;
  }

  // `first`: of the channels, in the first half. Empty slots are not read: zeros.
  __device__ __forceinline__ void load(Row& row, bool there, int64_t token, int64_t first) const {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      row[half] = Vec<T, kSize>{};
      if (there)
        row[half].load(source + token * side.stride_token + (first + half * bytes) * side.stride_dim);
    }
  }

  __device__ __forceinline__ uint8_t* codes(int64_t token, int64_t first) const {
    return side.codes + ((number * p.block_size + token) * p.num_heads + head) * bytes + first;
  }
};

// Calls first(values of a token) for all tokens of a column, and once done() has run, second(). `kTokens`
// tokens at once; those from kHeldTokens turns on are read twice.
template <typename Block, typename First, typename Done, typename Second>
__device__ __forceinline__ void two_passes(const Block& block, bool own, int64_t token, int64_t tokens,
                                           int64_t channel, First first, Done done, Second second) {
  typename Block::Row held[kHeldTokens];
  bool there[kHeldTokens];
  const int64_t size = block.p.block_size, turn = tokens * kHeldTokens;
  const auto load = [&](int64_t from) {
#pragma unroll
    for (int i = 0; i < kHeldTokens; ++i) {
      const int64_t at = from + i * tokens;
      there[i] = own && block.present(at);
      block.load(held[i], there[i], at, channel);
    }
  };
  for (int64_t from = token; from - token < size; from += turn) {
    load(from);
#pragma unroll
    for (int i = 0; i < kHeldTokens; ++i) first(held[i], there[i], from + i * tokens);
  }
  done();
  for (int64_t from = token; from - token < size; from += turn) {
    if (size > turn) load(from);
#pragma unroll
    for (int i = 0; i < kHeldTokens; ++i) {
      const int64_t at = from + i * tokens;
      if (own && at < size) second(held[i], there[i], at);
    }
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void quantize_fp8(const QuantizedBlock<T, kSize, false>& block) {
  using Row = typename QuantizedBlock<T, kSize, false>::Row;
  __shared__ float found[kQuantizeThreads / 32];
  const int thread = static_cast<int>(threadIdx.x);
  const auto columns = static_cast<int32_t>(block.p.head_dim / kSize);
  const auto items = columns * static_cast<int32_t>(block.p.block_size);
  float most = 0.0f;
  Row held[kHeldTokens];
  const auto load = [&](int32_t item, Row& row) {
    const int32_t token = item / columns, column = item - token * columns;
    block.load(row, item < items && block.present(token), token, int64_t{column} * kSize);
  };
  constexpr int32_t kTurn = kHeldTokens * kQuantizeThreads;
  for (int32_t from = thread; from - thread < items; from += kTurn) {
#pragma unroll
    for (int i = 0; i < kHeldTokens; ++i) load(from + i * kQuantizeThreads, held[i]);
#pragma unroll
    for (int i = 0; i < kHeldTokens; ++i) {
      float values[kSize];
      held[i][0].widen(values);
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        most = max_or_nan(most, __uint_as_float(__float_as_uint(values[j]) & 0x7fffffffu));
    }
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) most = max_or_nan(most, __shfl_xor_sync(~0u, most, step));
  if (thread % 32 == 0) found[thread / 32] = most;
  __syncthreads();
  for (int i = 0; i < kQuantizeThreads / 32; ++i) most = max_or_nan(most, found[i]);
  const float scale = __fdiv_rn(most, 448.0f);
  if (thread == 0)
    static_cast<float*>(block.side.scale)[block.number * block.p.num_heads + block.head] = scale;
  for (int32_t from = thread; from - thread < items; from += kTurn) {
#pragma unroll
    for (int i = 0; i < kHeldTokens; ++i) {
      const int32_t item = from + i * kQuantizeThreads, token = item / columns;
      if (item >= items) break;
      if (items > kTurn) load(item, held[i]);
      float values[kSize];
      held[i][0].widen(values);
      uint32_t codes[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) codes[j] = e4m3_of(__fdiv_rn(values[j], scale));
      if (!block.present(token)) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) codes[j] = 0;
      }
      store_codes(block.codes(token, int64_t{item - token * columns} * kSize), codes);
    }
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void quantize_int4(const QuantizedBlock<T, kSize, true>& block, bool keys) {
  using Block = QuantizedBlock<T, kSize, true>;
  using Row = typename Block::Row;
  constexpr int kPairs = 2 * kSize;
  __shared__ float2 found[kPairs][kQuantizeThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const auto all = static_cast<int>(block.bytes / kSize), columns = min(all, kQuantizeThreads);
  const int tokens = kQuantizeThreads / columns, token = thread / columns, column = thread - token * columns;
  // Lanes of a warp have whole tokens, a power of two of them.
  const bool whole = 32 % columns == 0;
  const int apart = whole ? 32 : columns;  // threads whose extremes of the same column are to be joined
  const auto widen = [](const Row& row, float (&values)[2][kSize]) {
    row[0].widen(values[0]);
    row[1].widen(values[1]);
  };
  const auto encode = [&](const Row& row, bool there, int64_t at, int64_t channel, const auto& pair_of) {
    float values[2][kSize];
    widen(row, values);
    uint32_t codes[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      codes[j] = pair_of(j).code(values[0][j]) | pair_of(kSize + j).code(values[1][j]) << 4;
      if (!there) codes[j] = 0;
    }
    store_codes(block.codes(at, channel), codes);
  };

  if (keys) {
    const int64_t scales = (block.number * block.p.num_heads + block.head) * block.p.head_dim * 2;
    for (int first = 0; first < all; first += columns) {
      const int64_t channel = int64_t{first + column} * kSize;
      const bool own = token < tokens && first + column < all;
      Extremes extremes[kPairs];
      QuantizedPair pairs[kPairs];
      two_passes(
          block, own, token, tokens, channel,
          [&](const Row& row, bool there, int64_t) {
            float values[2][kSize];
            widen(row, values);
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
              if (there) extremes[j].add(values[j / kSize][j % kSize]);
            }
          },
          [&] {
            __syncthreads();  // what was there before has been read
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
              for (int step = columns; whole && step < 32; step *= 2) extremes[j].add_lane(step);
              found[j][thread] = make_float2(extremes[j].low, extremes[j].high);
            }
            __syncthreads();
#pragma unroll
            for (int j = 0; j < kPairs; ++j) {
              for (int i = 0; i < kQuantizeThreads / apart; ++i) {
                const float2 other = found[j][i * apart + column];
                extremes[j].add(other.x, other.y);
              }
              pairs[j] = QuantizedPair(extremes[j]);
              const int64_t dim = channel + j % kSize + j / kSize * block.bytes;
              if (own && token == 0)
                pairs[j].write(block.side.scale, scales + dim, scales + block.p.head_dim + dim);
            }
          },
          [&](const Row& row, bool there, int64_t at) {
            encode(row, there, at, channel, [&](int j) { return pairs[j]; });
          });
    }
    return;
  }
  // A token's values: all its columns share a pair.
  for (int64_t from = 0; from < block.p.block_size; from += tokens) {
    const int64_t at = from + token;
    const bool own = token < tokens && at < block.p.block_size, there = own && block.present(at);
    Extremes extremes;
    Row row;
    for (int first = column; first < all; first += columns) {
      block.load(row, there, at, int64_t{first} * kSize);
      float values[2][kSize];
      widen(row, values);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        if (there) extremes.add(values[j / kSize][j % kSize]);
      }
    }
    for (int step = 1; whole && step < columns; step *= 2) extremes.add_lane(step);
    if (!whole) {
      __syncthreads();  // what was there before has been read
      found[0][thread] = make_float2(extremes.low, extremes.high);
      __syncthreads();
      for (int i = 0; own && i < columns; ++i) {
        const float2 other = found[0][token * columns + i];
        extremes.add(other.x, other.y);
      }
    }
    if (!own) continue;
    const QuantizedPair pair(extremes);
    const int64_t own_pair = ((block.number * block.p.block_size + at) * block.p.num_heads + block.head) * 2;
    if (column == 0) pair.write(block.side.scale, own_pair, own_pair + 1);
    for (int first = column; first < all; first += columns) {
      if (all > columns) block.load(row, there, at, int64_t{first} * kSize);
      encode(row, there, at, int64_t{first} * kSize, [&](int) { return pair; });
    }
  }
}

// Grid: keys and values of each block and head.
template <typename T, int kSize, bool kInt4>
__global__ void __launch_bounds__(kQuantizeThreads, 4)
    quantize_blocks_kernel(const __grid_constant__ QuantizeBlocks p) {
  const bool keys = blockIdx.x % 2 == 0;
  const QuantizedBlock<T, kSize, kInt4> block(p, keys ? p.k : p.v, blockIdx.x / 2);
  if constexpr (kInt4) {
    quantize_int4(block, keys);
  } else {
    quantize_fp8(block);
  }
}

}  // namespace livevlm
