// SPDX-License-Identifier: Apache-2.0
// What `block_attention` reads on CPUs: queries and keys, widened to float32 and rotated.
#pragma once

#include "block_attention/attention_panel.h"
#include "block_attention/block_attention.h"

namespace livevlm::LIVEVLM_CPU {

inline constexpr int64_t kAhead = 16;  // keys
inline constexpr int64_t kLine = 64;   // bytes

inline int64_t position_at(const void* positions, bool int64, int64_t at) {
  return int64 ? static_cast<const int64_t*>(positions)[at] : static_cast<const int32_t*>(positions)[at];
}

// Half-split RoPE of a row, in place. `table`: the cosines, then the sines of its position.
template <typename T>
void rotate(const T* table, int64_t half, float* row) {
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const Lanes cosine = load(table + i), sine = load(table + half + i);
    const Lanes first = load(row + i), second = load(row + half + i);
    store(row + i, first * cosine - second * sine);
    store(row + half + i, second * cosine + first * sine);
  }
  for (; i < half; ++i) {
    const float cosine = to_float(table[i]), sine = to_float(table[half + i]);
    const float first = row[i], second = row[half + i];
    row[i] = first * cosine - second * sine;
    row[half + i] = second * cosine + first * sine;
  }
}

inline void rotate(const BlockAttention& p, int64_t position, float* row) {
  position = position < 0 ? 0 : position < p.max_position ? position : p.max_position - 1;
  const int64_t at = position * p.head_dim, half = p.head_dim / 2;
  if (p.cos_sin_half) {
    rotate(static_cast<const Half*>(p.cos_sin_cache) + at, half, row);
  } else {
    rotate(static_cast<const float*>(p.cos_sin_cache) + at, half, row);
  }
}

// One row of one head; writes up to a multiple of kWidth, with zeros.
template <typename T>
void load_row(const Tokens& tokens, int64_t batch, int64_t token, int64_t head, int64_t head_dim,
              float* __restrict row) {
  const T* source = static_cast<const T*>(tokens.data) + batch * tokens.stride_batch +
                    token * tokens.stride_token + head * tokens.stride_head;
  for_each_lanes(source, head_dim, tokens.stride_dim, [=](int64_t i, Lanes x) { store(row + i, x); });
}

// e4m3, whose NaN counts as the number that its bits would be.
inline float from_e4m3(uint8_t code) {
  const uint32_t bits = uint32_t{code & 0x80u} << 24 | uint32_t{code & 0x7fu} << 20;
  return bits_to_float(bits) * 0x1p120f;  // float32's exponent is biased by 120 more
}

// A row of a quantised pool, as load_row.
inline void load_bytes(const BlockAttention& p, bool key, int64_t block, int64_t slot, int64_t head,
                       float* __restrict row) {
  const Tokens& tokens = key ? p.k : p.v;
  const uint8_t* codes = static_cast<const uint8_t*>(tokens.data) + block * tokens.stride_batch +
                         slot * tokens.stride_token + head * tokens.stride_head;
  const void* const scales = key ? p.k_scale : p.v_scale;
  int64_t i = 0;
  if (p.format == PoolFormat::kFp8) {
    const float scale = static_cast<const float*>(scales)[block * p.num_heads + head];
    for (; i < p.head_dim; ++i) row[i] = from_e4m3(codes[i * tokens.stride_dim]) * scale;
  } else {
    const int64_t half = p.head_dim / 2;
    const int64_t number =
        key ? (block * p.num_heads + head) * p.head_dim : (block * p.block_size + slot) * p.num_heads + head;
    const Half* pairs = static_cast<const Half*>(scales) + number * 2;
    for (; i < p.head_dim; ++i) {
      const uint32_t byte = codes[(i < half ? i : i - half) * tokens.stride_dim];
      const Half *scale = pairs + (key ? i : 0), *low = pairs + (key ? p.head_dim + i : 1);
      row[i] = static_cast<float>(i < half ? byte & 15u : byte >> 4) * to_float(*scale) + to_float(*low);
    }
  }
  for (; i % kWidth != 0; ++i) row[i] = 0.0f;
}

// Asks for a key and its value ahead of time: rows of one head are too far apart for the processor to guess.
// Inlined by force: GCC takes a function that only prefetches for one that does nothing, and drops its calls.
template <typename T>
[[gnu::always_inline]] inline void prefetch(const BlockAttention& p, const int32_t* table, int64_t head,
                                            int64_t token, int64_t end) {
  if (token >= end) return;
  const int64_t column = token / p.block_size, block = table[column], slot = token - column * p.block_size;
  if (block < 0 || block >= p.num_blocks) return;
  for (const Tokens* tokens : {&p.k, &p.v}) {
    const T* row = static_cast<const T*>(tokens->data) + block * tokens->stride_batch +
                   slot * tokens->stride_token + head * tokens->stride_head;
    for (int64_t i = 0; i < p.head_dim; i += kLine / sizeof(T))
      __builtin_prefetch(row + i * tokens->stride_dim);
  }
}

// Fills a tile with the next keys from number `token` up to `end`; returns the number to go on with.
template <typename T>
int64_t load_keys(const BlockAttention& p, int64_t batch, int64_t head, int64_t token, int64_t end,
                  KeyTile& tile) {
  const int32_t* table = p.block_table + batch * p.table_stride_batch + head * p.table_stride_head;
  tile.count = 0;
  while (token < end && tile.count < kTileKeys) {
    const int64_t column = token / p.block_size, block = table[column];
    const int64_t block_end = (column + 1) * p.block_size, stop = block_end < end ? block_end : end;
    if (block < 0 || block >= p.num_blocks) {
      token = stop;
      continue;
    }
    for (; token < stop && tile.count < kTileKeys; ++token) {
      const int64_t slot = token - column * p.block_size;
      const int64_t position =
          p.positions ? position_at(p.positions, p.positions_int64, block * p.block_size + slot) : token;
      if (p.format == PoolFormat::kFloats) prefetch<T>(p, table, head, token + kAhead, end);
      if (position < 0) continue;
      float* key = tile.keys + tile.count * tile.pitch;
      float* value = tile.values + tile.count * tile.pitch;
      if (p.format == PoolFormat::kFloats) {
        load_row<T>(p.k, block, slot, head, p.head_dim, key);
        load_row<T>(p.v, block, slot, head, p.head_dim, value);
      } else {
        load_bytes(p, true, block, slot, head, key);
        load_bytes(p, false, block, slot, head, value);
      }
      if (p.cos_sin_cache) rotate(p, p.packed ? token : position, key);
      tile.numbers[tile.count++] = static_cast<int32_t>(token);
    }
  }
  return token;
}

}  // namespace livevlm::LIVEVLM_CPU
