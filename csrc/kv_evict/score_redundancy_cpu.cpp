// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `score_redundancy`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
#include <cmath>

#include "common/cpu_lanes.h"
#include "common/parallel.h"
#include "kv_evict/score_redundancy.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

template <typename T>
const T* row_of(const Tokens& tokens, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(tokens.data) + batch * tokens.stride_batch + token * tokens.stride_token +
         head * tokens.stride_head;
}

template <typename T>
float norm(const T* row, int64_t count, int64_t stride) {
  Lanes squares{};
  for_each_lanes(row, count, stride, [&](int64_t, Lanes x) { squares += x * x; });
  return std::sqrt(sum(squares));
}

// The mean of cosines over frames is one dot product with the mean of the recent unit keys.
template <typename T>
void mean_unit_key(const ScoreRedundancy& p, int64_t batch, int64_t slot, int64_t head, float* patch) {
  const int64_t stride = p.recent_k.stride_dim;
  for (int64_t i = 0; i < p.head_dim; i += kWidth) store(patch + i, Lanes{});
  for (int64_t frame = 0; frame < p.num_frames; ++frame) {
    const T* row = row_of<T>(p.recent_k, batch, slot, head) + frame * p.stride_frame;
    const float length = norm(row, p.head_dim, stride);
    const float divisor = length == 0.0f ? 1.0f : length;  // a zero key stays zero
    for_each_lanes(row, p.head_dim, stride,
                   [=](int64_t i, Lanes x) { store(patch + i, load(patch + i) + x / divisor); });
  }
  const auto count = static_cast<float>(p.num_frames);
  for (int64_t i = 0; i < p.head_dim; i += kWidth) store(patch + i, load(patch + i) / count);
}

template <typename T>
float cosine(const ScoreRedundancy& p, const T* key, const float* patch) {
  Lanes dots{}, squares{};
  for_each_lanes(key, p.head_dim, p.k.stride_dim, [&](int64_t i, Lanes x) {
    dots += x * load(patch + i);
    squares += x * x;
  });
  const float length = std::sqrt(sum(squares));
  return sum(dots) / (length == 0.0f ? 1.0f : length);
}

// `patches`: [tokens_per_frame, num_heads, pitch] of this sequence.
template <typename T>
void one_token(const ScoreRedundancy& p, const float* patches, int64_t pitch, int64_t batch, int64_t token) {
  const bool valid = token < (p.seq_lens ? p.seq_lens[batch] : p.seq_len);
  const int64_t slot = p.slots[batch * p.seq_len + token];
  const bool has_slot = valid && slot >= 0 && slot < p.tokens_per_frame;
  float similarities = 0.0f, norms = 0.0f;
  for (int64_t head = 0; head < p.num_heads; ++head) {
    float similarity = 0.0f, value_norm = 0.0f;
    if (has_slot)
      similarity =
          cosine(p, row_of<T>(p.k, batch, token, head), patches + (slot * p.num_heads + head) * pitch);
    if (valid) value_norm = norm(row_of<T>(p.v, batch, token, head), p.head_dim, p.v.stride_dim);
    if (p.per_head) {
      const int64_t at = (batch * p.num_heads + head) * p.seq_len + token;
      p.similarity[at] = similarity;
      p.value_norm[at] = value_norm;
    }
    similarities += similarity;
    norms += value_norm;
  }
  if (p.per_head) return;
  p.similarity[batch * p.seq_len + token] = similarities / static_cast<float>(p.num_heads);
  p.value_norm[batch * p.seq_len + token] = norms / static_cast<float>(p.num_heads);
}

}  // namespace

void score_redundancy_cpu(const ScoreRedundancy& params) {
  constexpr int64_t kGrain = 32768;      // elements worth waking a thread for
  constexpr int64_t kPatches = 1 << 20;  // floats; one sequence takes what it needs in any case
  const ScoreRedundancy& p = params;
  const int64_t pitch = round_up(p.head_dim, kWidth), num_patches = p.tokens_per_frame * p.num_heads;
  const int64_t grain = kGrain / (p.num_heads * p.head_dim) + 1;
  // Some sequences after others, each by all threads: what is kept of the recent keys takes little memory.
  const int64_t fit = kPatches / (num_patches * pitch) + 1, step = fit < p.batch ? fit : p.batch;
  const Scratch<float> patches(step * num_patches * pitch);
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t begin = 0; begin < p.batch; begin += step) {
      const int64_t count = p.batch - begin < step ? p.batch - begin : step;
      parallel_for(0, count * num_patches, kGrain / (p.num_frames * p.head_dim) + 1,
                   [&](int64_t first, int64_t last) {
                     for (int64_t i = first; i < last; ++i)
                       mean_unit_key<T>(p, begin + i / num_patches, i % num_patches / p.num_heads,
                                        i % p.num_heads, patches + i * pitch);
                   });
      parallel_for(0, count * p.seq_len, grain, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          one_token<T>(p, patches + i / p.seq_len * num_patches * pitch, pitch, begin + i / p.seq_len,
                       i % p.seq_len);
      });
    }
  });
}

}  // namespace livevlm::LIVEVLM_CPU
