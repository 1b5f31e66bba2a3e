// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `merge_states`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
#include <cmath>

#include "block_attention/merge_states.h"
#include "common/cpu_lanes.h"
#include "common/parallel.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

// One head of one query. `sums`: room for head_dim floats, in registers' width.
template <typename T>
void one_row(const MergeStates& p, int64_t query, int64_t head, float* sums) {
  const float* lses = p.lses + query * p.lse_stride_token + head * p.lse_stride_head;
  float top = std::numeric_limits<float>::lowest();  // the exp of -inf - -inf would be NaN
  for (int64_t part = 0; part < p.num_parts; ++part) {
    const float lse = lses[part * p.lse_stride_part];
    top = lse > top ? lse : top;
  }
  float total = 0.0f;
  for (int64_t i = 0; i < p.head_dim; i += kWidth) store(sums + i, Lanes{});
  for (int64_t part = 0; part < p.num_parts; ++part) {
    const float lse = lses[part * p.lse_stride_part];
    if (lse == -kInfinity) continue;  // its output may hold anything
    const float weight = std::exp(lse - top);
    total += weight;
    const T* source = static_cast<const T*>(p.outs.data) + part * p.outs.stride_batch +
                      query * p.outs.stride_token + head * p.outs.stride_head;
    for_each_lanes(source, p.head_dim, p.outs.stride_dim,
                   [=](int64_t i, Lanes x) { store(sums + i, load(sums + i) + x * weight); });
  }
  const int64_t row = query * p.num_heads + head;
  T* out = static_cast<T*>(p.out) + row * p.head_dim;
  for (int64_t i = 0; i < p.head_dim; i += kWidth) {
    const Lanes result = load(sums + i) / (total == 0.0f ? 1.0f : total);
    store(out + i, result, p.head_dim - i < kWidth ? p.head_dim - i : kWidth);
  }
  p.lse[row] = top + std::log(total);  // -inf for 0
}

}  // namespace

void merge_states_cpu(const MergeStates& params) {
  constexpr int64_t kGrain = 32768;  // elements worth waking a thread for
  const MergeStates& p = params;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t grain = kGrain / (p.num_parts * p.head_dim) + 1;
    parallel_for(0, p.total_q * p.num_heads, grain, [&](int64_t first, int64_t last) {
      const Scratch<float> sums(round_up(p.head_dim, kWidth));
      for (int64_t i = first; i < last; ++i) one_row<T>(p, i / p.num_heads, i % p.num_heads, sums);
    });
  });
}

}  // namespace livevlm::LIVEVLM_CPU
