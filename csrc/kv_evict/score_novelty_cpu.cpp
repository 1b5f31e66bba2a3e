// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `score_novelty`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
#include "kv_evict/score_novelty.h"

#include <cmath>

#include "common/cpu_lanes.h"
#include "common/parallel.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

// Between two tokens, over all heads.
template <typename T, typename U>
float distance(const ScoreNovelty& p, const Tokens& a, int64_t a_token, const Tokens& b, int64_t b_token,
               int64_t batch) {
  const T* first = static_cast<const T*>(a.data) + batch * a.stride_batch + a_token * a.stride_token;
  const U* second = static_cast<const U*>(b.data) + batch * b.stride_batch + b_token * b.stride_token;
  const bool dense = a.stride_dim == 1 && b.stride_dim == 1;
  Lanes squares{};
  for (int64_t head = 0; head < p.num_heads; ++head) {
    int64_t i = 0;
    for (; dense && i + kWidth <= p.head_dim; i += kWidth) {
      const Lanes difference = load(first + i) - load(second + i);
      squares += difference * difference;
    }
    for (; i < p.head_dim; i += kWidth) {
      const int64_t count = p.head_dim - i < kWidth ? p.head_dim - i : kWidth;
      const Lanes difference = gather(first + i * a.stride_dim, count, a.stride_dim) -
                               gather(second + i * b.stride_dim, count, b.stride_dim);
      squares += difference * difference;
    }
    first += a.stride_head;
    second += b.stride_head;
  }
  return std::sqrt(sum(squares));
}

template <typename T>
void one_token(const ScoreNovelty& p, int64_t batch, int64_t token) {
  const int64_t given = p.seq_lens ? p.seq_lens[batch] : p.seq_len;
  const int64_t length = given < p.seq_len ? given : p.seq_len, at = batch * p.seq_len + token;
  const int64_t slot = p.slots[at], previous = p.previous[at];
  float change = 0.0f, step = 0.0f;
  if (token < length) {
    change = step = kInfinity;
    if (slot >= 0 && slot < p.tokens_per_frame)
      change = distance<T, float>(p, p.x, token, p.usual, slot, batch);
    if (previous >= 0 && previous < length) step = distance<T, T>(p, p.x, token, p.x, previous, batch);
  }
  p.change[at] = change;
  p.step[at] = step;
}

}  // namespace

void score_novelty_cpu(const ScoreNovelty& params) {
  constexpr int64_t kGrain = 32768;  // elements worth waking a thread for
  const ScoreNovelty& p = params;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(0, p.batch * p.seq_len, kGrain / (p.num_heads * p.head_dim) + 1,
                 [&](int64_t first, int64_t last) {
                   for (int64_t i = first; i < last; ++i) one_token<T>(p, i / p.seq_len, i % p.seq_len);
                 });
  });
}

}  // namespace livevlm::LIVEVLM_CPU
