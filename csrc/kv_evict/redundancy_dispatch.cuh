// SPDX-License-Identifier: Apache-2.0
// Chooses how many elements a load has, and how many lanes share a token, for `score_redundancy` and what is
// built from it.
#pragma once

#include "common/cuda_launch.cuh"
#include "kv_evict/score_redundancy.cuh"

namespace livevlm {

inline bool vectorised(const Tokens& tokens, int64_t element_size) {
  return tokens.stride_dim == 1 &&
         rows_aligned16(tokens.data, element_size,
                        {tokens.stride_batch, tokens.stride_token, tokens.stride_head});
}

// Calls body(TypeTag<T>{}, IntTag<elements of a load>{}, IntTag<lanes>{}).
template <typename Body>
void dispatch_redundancy(const ScoreRedundancy& op, Body body) {
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kSize = kVectorSize<T>;
    const bool wide = op.head_dim % kSize == 0 && vectorised(op.k, sizeof(T)) &&
                      vectorised(op.v, sizeof(T)) && vectorised(op.recent_k, sizeof(T)) &&
                      op.stride_frame * int64_t{sizeof(T)} % 16 == 0;
    if (!wide) return body(type, IntTag<1>{}, IntTag<32>{});
    if (op.head_dim <= 8 * kSize) return body(type, IntTag<kSize>{}, IntTag<8>{});
    if (op.head_dim <= 16 * kSize) return body(type, IntTag<kSize>{}, IntTag<16>{});
    return body(type, IntTag<kSize>{}, IntTag<32>{});
  });
}

}  // namespace livevlm
