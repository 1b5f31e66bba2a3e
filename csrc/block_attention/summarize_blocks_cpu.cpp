// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `summarize_blocks`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
#include <limits>

#include "block_attention/summarize_blocks.h"
#include "common/cpu_float.h"
#include "common/parallel.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void fill(float* row, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) row[i] = value;
}

// The output row is the accumulator: at a few kilobytes it stays in L1 while the block's tokens stream past.
template <typename T>
void mean(const SummarizeBlocks& p, const T* tokens, int64_t count, float* out) {
  const int64_t row = p.num_heads * p.head_dim;
  fill(out, row, 0.0f);
  for (int64_t token = 0; token < count; ++token) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      float* sum = out + head * p.head_dim;
      for_each_float(tokens + token * p.stride_token + head * p.stride_head, p.head_dim, p.stride_dim,
                     [=](int64_t i, float value) { sum[i] += value; });
    }
  }
  if (count == 0) return;
  for (int64_t i = 0; i < row; ++i) out[i] /= static_cast<float>(count);
}

template <typename T>
void minmax(const SummarizeBlocks& p, const T* tokens, int64_t count, float* out) {
  const int64_t row = p.num_heads * p.head_dim;
  fill(out, row, count == 0 ? 0.0f : kInfinity);
  fill(out + row, row, count == 0 ? 0.0f : -kInfinity);
  for (int64_t token = 0; token < count; ++token) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      float* low = out + head * p.head_dim;
      float* high = low + row;
      // `value != value` lets a NaN in, and then no later comparison takes it out: as torch.amin and amax do.
      for_each_float(tokens + token * p.stride_token + head * p.stride_head, p.head_dim, p.stride_dim,
                     [=](int64_t i, float value) {
                       low[i] = ((value < low[i]) | (value != value)) ? value : low[i];
                       high[i] = ((value > high[i]) | (value != value)) ? value : high[i];
                     });
    }
  }
}

template <typename T>
void one_block(const SummarizeBlocks& p, int64_t batch, int64_t block) {
  const int64_t begin = block * p.block_size;
  if (p.first_token && p.first_token[batch] - begin >= p.block_size) return;  // ends before the first change
  int64_t length = p.seq_lens ? p.seq_lens[batch] : p.seq_len;
  if (length > p.seq_len) length = p.seq_len;
  int64_t count = length - begin;
  if (count > p.block_size) count = p.block_size;
  if (count < 0) count = 0;

  const T* tokens = static_cast<const T*>(p.k) + batch * p.stride_batch + begin * p.stride_token;
  const int64_t row = p.num_heads * p.head_dim;
  float* out = p.out + (batch * p.num_blocks + block) * row * (p.minmax ? 2 : 1);
  p.minmax ? minmax(p, tokens, count, out) : mean(p, tokens, count, out);
}

}  // namespace

void summarize_blocks_cpu(const SummarizeBlocks& params) {
  constexpr int64_t kGrain = 32768;  // elements worth waking a thread for
  const int64_t work = params.num_heads * params.head_dim *
                       (params.block_size < params.seq_len ? params.block_size : params.seq_len);
  dispatch_float(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, params.batch * params.num_blocks, kGrain / work + 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        one_block<T>(params, i / params.num_blocks, i % params.num_blocks);
    });
  });
}

}  // namespace livevlm::LIVEVLM_CPU
