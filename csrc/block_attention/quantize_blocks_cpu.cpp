// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `quantize_blocks`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
#include <limits>

#include "block_attention/quantize_blocks.h"
#include "common/cpu_lanes.h"
#include "common/parallel.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

// Nearest, ties to even, up to 448; 0 for NaN.
uint8_t e4m3_of(float x) {
  if (x != x) return 0;
  const uint32_t sign = float_to_bits(x) >> 24 & 0x80u;
  float magnitude = bits_to_float(float_to_bits(x) & 0x7fffffffu);
  if (magnitude > 448.0f) magnitude = 448.0f;
  const uint32_t bits = float_to_bits(magnitude);
  // Below 2^-6, a multiple of 2^-9: adding 2^14, whose last bit is worth just that, rounds.
  const uint32_t code = magnitude < 0x1p-6f ? float_to_bits(magnitude + 0x1p14f) - float_to_bits(0x1p14f)
                                            : ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  return static_cast<uint8_t>(sign | code);
}

// A number of steps as a code: nearest, ties to even; 0 for NaN.
uint8_t int4_of(float steps) {
  const float clamped = steps > 15.0f ? 15.0f : steps > 0.0f ? steps : 0.0f;
  return static_cast<uint8_t>(float_to_bits(clamped + 0x1p23f));
}

// Elements that share a scale; once one is NaN, both stay it.
struct Extremes {
  float low = kInfinity, high = -kInfinity;

  void add(float x) {
    low = ((x < low) | (x != x)) ? x : low;
    high = ((x > high) | (x != x)) ? x : high;
  }
};

// A scale and a minimum, rounded to half precision, and what they stand for.
struct Pair {
  float scale = 0.0f, low = 0.0f;

  Pair(const Extremes& of, Half* scales, Half* minima) {
    const bool none = of.low == kInfinity && of.high == -kInfinity;
    *scales = from_float<Half>(none ? 0.0f : (of.high - of.low) / 15.0f);
    *minima = from_float<Half>(none ? 0.0f : of.low);
    scale = to_float(*scales), low = to_float(*minima);
  }
  uint8_t code(float x) const { return int4_of((x - low) / scale); }
};

template <typename T>
struct Block {
  const QuantizeBlocks& p;
  const QuantizeBlocks::Side& side;
  int64_t number, head;  // number: of all layers
  const T* source;
  const bool* present;

  float at(int64_t token, int64_t dim) const {
    return to_float(source[token * side.stride_token + dim * side.stride_dim]);
  }
  uint8_t* row(int64_t token) const {
    const int64_t bytes = p.int4 ? p.head_dim / 2 : p.head_dim;
    return side.codes + ((number * p.block_size + token) * p.num_heads + head) * bytes;
  }

  void fp8() const {
    float most = 0.0f;
    for (int64_t token = 0; token < p.block_size; ++token) {
      for (int64_t dim = 0; present[token] && dim < p.head_dim; ++dim) {
        const float x = at(token, dim), size = x < 0.0f ? -x : x;
        most = ((size > most) | (size != size)) ? size : most;
      }
    }
    const float scale = most / 448.0f;
    static_cast<float*>(side.scale)[number * p.num_heads + head] = scale;
    for (int64_t token = 0; token < p.block_size; ++token) {
      for (int64_t dim = 0; dim < p.head_dim; ++dim)
        row(token)[dim] = present[token] ? e4m3_of(at(token, dim) / scale) : 0;
    }
  }

  void int4_keys() const {
    const int64_t half = p.head_dim / 2;
    Half* const scales = static_cast<Half*>(side.scale) + (number * p.num_heads + head) * p.head_dim * 2;
    for (int64_t dim = 0; dim < half; ++dim) {
      Extremes first, second;
      for (int64_t token = 0; token < p.block_size; ++token) {
        if (present[token]) first.add(at(token, dim)), second.add(at(token, dim + half));
      }
      Half* const minima = scales + p.head_dim;
      const Pair low(first, scales + dim, minima + dim);
      const Pair high(second, scales + dim + half, minima + dim + half);
      for (int64_t token = 0; token < p.block_size; ++token) {
        row(token)[dim] =
            present[token]
                ? static_cast<uint8_t>(low.code(at(token, dim)) | high.code(at(token, dim + half)) << 4)
                : uint8_t{0};
      }
    }
  }

  void int4_values() const {
    const int64_t half = p.head_dim / 2;
    for (int64_t token = 0; token < p.block_size; ++token) {
      Extremes all;
      for (int64_t dim = 0; present[token] && dim < p.head_dim; ++dim) all.add(at(token, dim));
      Half* const target =
          static_cast<Half*>(side.scale) + ((number * p.block_size + token) * p.num_heads + head) * 2;
      const Pair pair(all, target, target + 1);
      for (int64_t dim = 0; dim < half; ++dim) {
        row(token)[dim] =
            present[token]
                ? static_cast<uint8_t>(pair.code(at(token, dim)) | pair.code(at(token, dim + half)) << 4)
                : uint8_t{0};
      }
    }
  }
};

bool is_present(const QuantizeBlocks& p, int64_t batch, int64_t slot) {
  if (!p.positions) return true;
  const int64_t at = batch * p.positions_batch + slot;
  return (p.positions_int64 ? static_cast<const int64_t*>(p.positions)[at]
                            : static_cast<const int32_t*>(p.positions)[at]) >= 0;
}

}  // namespace

void quantize_blocks_cpu(const QuantizeBlocks& params) {
  constexpr int64_t kGrain = 8192;  // elements worth waking a thread for
  const QuantizeBlocks& p = params;
  const int64_t work = 2 * p.num_heads * p.block_size * p.head_dim;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, p.batch * p.num_blocks, kGrain / work + 1, [&](int64_t first, int64_t last) {
      const Scratch<bool> present(p.block_size);
      for (int64_t number = first; number < last; ++number) {
        const int64_t batch = number / p.num_blocks, block = number - batch * p.num_blocks;
        for (int64_t token = 0; token < p.block_size; ++token)
          present[token] = is_present(p, batch, block * p.block_size + token);
        for (int64_t head = 0; head < p.num_heads; ++head) {
          for (const auto* side : {&p.k, &p.v}) {
            const T* source = static_cast<const T*>(side->data) + batch * side->stride_batch +
                              block * side->stride_block + head * side->stride_head;
            const Block<T> one{p, *side, number, head, source, present};
            !p.int4 ? one.fp8() : side == &p.k ? one.int4_keys() : one.int4_values();
          }
        }
      }
    });
  });
}

}  // namespace livevlm::LIVEVLM_CPU
