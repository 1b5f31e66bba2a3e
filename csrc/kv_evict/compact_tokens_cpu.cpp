// SPDX-License-Identifier: Apache-2.0
// CPU kernel of `compact_tokens`. Compiled once per instruction set; LIVEVLM_CPU names the namespace.
//
// Tokens move forward or not at all, so that going through the kept ones in ascending order needs no copy: no
// row is read after it was written.
#include <cstring>

#include "common/parallel.h"
#include "kv_evict/compact_tokens.h"

namespace livevlm::LIVEVLM_CPU {
namespace {

constexpr int64_t kMaxRuns = 64;  // of a task: where token is the fastest dimension, their lines stay in L1

// What a row is made of: runs of consecutive bytes.
struct Runs {
  int64_t bytes, count;
  int num_dims;
};

Runs runs_of(const Rows& rows) {
  const int last = rows.num_dims - 1;
  const bool whole = last >= 0 && (rows.strides[last] == rows.unit || rows.sizes[last] == 1);
  const int64_t units = whole ? rows.sizes[last] : 1;
  return {units * rows.unit, rows.num_units / units, whole ? last : rows.num_dims};
}

// Where a run lies in its row. Not piece_offset(), which is one function for all instruction sets.
int64_t run_offset(const Rows& rows, const Runs& runs, int64_t index) {
  int64_t offset = 0;
  for (int dim = runs.num_dims - 1; dim >= 0; --dim) {
    offset += index % rows.sizes[dim] * rows.strides[dim];
    index /= rows.sizes[dim];
  }
  return offset;
}

// Moves some runs of the kept tokens of one sequence, or of one head of it. kBytes 0: any number of bytes.
template <int64_t kBytes>
void move(const CompactTokens& p, char* data, int64_t stride_token, const int32_t* indices,
          const int64_t* offsets, int64_t num_runs, int64_t bytes) {
  for (int64_t row = 0; row < p.num_kept; ++row) {
    const int64_t index = indices[row];
    if (index < 0 || index >= p.seq_len || index == row) continue;
    char* target = data + row * stride_token;
    const char* source = data + index * stride_token;
    for (int64_t run = 0; run < num_runs; ++run)
      std::memmove(target + offsets[run], source + offsets[run],
                   static_cast<size_t>(kBytes ? kBytes : bytes));
  }
}

auto mover(int64_t bytes) {
  switch (bytes) {
    case 1:
      return move<1>;
    case 2:
      return move<2>;
    case 4:
      return move<4>;
    case 8:
      return move<8>;
    case 16:
      return move<16>;
    default:
      return move<0>;
  }
}

void compact(const CompactTokens& p, const Rows& rows) {
  constexpr int64_t kGrain = 65536;  // bytes worth waking a thread for
  const Runs runs = runs_of(rows);
  const auto move_runs = mover(runs.bytes);
  const int64_t tasks = (runs.count + kMaxRuns - 1) / kMaxRuns;  // of a head
  const int64_t work = p.num_kept * runs.bytes * (runs.count < kMaxRuns ? runs.count : kMaxRuns);
  parallel_for(0, p.batch * p.num_heads * tasks, kGrain / (work + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t sequence = i / tasks, begin = i % tasks * kMaxRuns;
      const int64_t count = runs.count - begin < kMaxRuns ? runs.count - begin : kMaxRuns;
      int64_t offsets[kMaxRuns];
      for (int64_t run = 0; run < count; ++run) offsets[run] = run_offset(rows, runs, begin + run);
      char* data =
          rows.data + sequence / p.num_heads * rows.stride_batch + sequence % p.num_heads * rows.stride_head;
      move_runs(p, data, rows.stride_token, p.indices + sequence * p.num_kept, offsets, count, runs.bytes);
    }
  });
}

}  // namespace

void compact_tokens_cpu(const CompactTokens& params) {
  for (int i = 0; i < params.num_tensors; ++i) compact(params, params.tensors[i]);
}

}  // namespace livevlm::LIVEVLM_CPU
