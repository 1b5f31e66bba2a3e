// SPDX-License-Identifier: Apache-2.0
#include "kv_evict/select_tokens.cuh"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "kv_evict/select_long_rows.cuh"

namespace livevlm {
namespace {

// LIVEVLM_SELECT=split in the environment splits rows of any length, so that tests reach all cases quickly.
bool splits_all() {
  static const bool wanted = [] {
    const char* value = std::getenv("LIVEVLM_SELECT");
    return value && std::string_view(value) == "split";
  }();
  return wanted;
}

// By a row's length alone, as everything else: but for speed a row does not depend on what is in its batch.
bool is_long(const SelectTokens& op) {
  return splits_all() || !fits_staged(op.seq_len, sizeof(TopShared));
}

bool walks(const SelectTokens& op) {
  return op.num_top < op.budget;
}

// Few enough chunks that a block can add up what those before it counted; each is a few microseconds of work.
int64_t chunk_tokens(int64_t seq_len) {
  if (splits_all()) return std::clamp<int64_t>(ceil_div(ceil_div(seq_len, 8), 32), 1, kRowThreads) * 32;
  constexpr int64_t kLeast = 8 * kRowThreads, kMost = kMaxStagedWords * kRowThreads, kChunks = 128;
  return std::clamp(ceil_div(ceil_div(seq_len, kChunks), kRowThreads) * kRowThreads, kLeast, kMost);
}

struct Plan {
  LongRows rows;  // all that blocks which have a row for themselves need is in `rows.select`
  int64_t zeros;  // bytes that must be zero
  int64_t bytes;
};

// Splits the workspace.
Plan plan(const SelectTokens& op, char* workspace) {
  Plan plan{};
  LongRows& rows = plan.rows;
  SelectKernel& kernel = rows.select;
  kernel.op = op;
  kernel.index_bits = 4;
  while ((int64_t{1} << kernel.index_bits) < op.seq_len) kernel.index_bits += 4;
  // By place, more buckets than tokens change nothing: every token already has its own.
  if (!op.buckets && op.num_buckets > op.seq_len) kernel.op.num_buckets = op.seq_len;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + plan.bytes);
    plan.bytes += count * static_cast<int64_t>(sizeof(*pointer));
  };
  const int64_t buckets = walks(op) ? op.batch * kernel.op.num_buckets : 0;
  take(kernel.thresholds, buckets);
  if (is_long(op)) {
    rows.words = ceil_div(op.seq_len, 32);
    rows.chunk_tokens = static_cast<int32_t>(chunk_tokens(op.seq_len));
    rows.num_chunks = static_cast<uint32_t>(ceil_div(op.seq_len, rows.chunk_tokens));
    take(rows.histograms, op.batch * kHistograms * kDigits);
    plan.zeros = plan.bytes;
    take(rows.flags, op.batch * rows.words);
    take(rows.counts, op.batch * rows.num_chunks);
    take(rows.cuts, op.batch * kSteps);
    take(rows.keys, op.batch * op.seq_len);
  }
  take(kernel.digits, op.bucket_capacity > 1 ? buckets * 17 : 0);
  return plan;
}

void launch_long(const Plan& plan, void* workspace, cudaStream_t stream) {
  LongRows rows = plan.rows;
  const SelectTokens& op = rows.select.op;
  const dim3 grid = grid_of(op.batch * rows.num_chunks);
  const auto launch = [&](void (*kernel)(LongRows), const char* name) {
    launch_kernel(kernel, grid, kRowThreads, 0, stream, rows, name);
  };
  const auto search = [&](int first) {  // ends with counting
    for (rows.step = first; rows.step < first + 2; ++rows.step)
      launch(count_digit_kernel, "select_tokens: digit");
    launch(count_taken_kernel, "select_tokens: taken");
  };
  zero(workspace, plan.zeros, stream);
  dispatch_float(op.dtype, [&](auto type) {
    launch(order_chunk_kernel<typename decltype(type)::type>, "select_tokens: keys");
  });
  search(0);
  if (walks(op)) {
    if (op.bucket_capacity > 1) {
      const dim3 bucket_grid = grid_of(ceil_div(op.batch * op.num_buckets, kRowThreads));
      const auto find = [&](int shift) {
        rows.shift = shift;
        launch_kernel(find_bucket_digits_kernel, bucket_grid, kRowThreads, 0, stream, rows,
                      "select_tokens: buckets");
      };
      find(kStartSearch);
      for (int shift = 60; shift >= 0; shift = next_shift(shift, rows.select.index_bits)) {
        rows.shift = shift;
        launch(count_bucket_digits_kernel, "select_tokens: digits of buckets");
        find(shift);
      }
    }
    launch(mark_second_kernel, "select_tokens: second");
    search(kPasses);
  }
  launch(write_chunk_kernel, "select_tokens: indices");
}

}  // namespace

int64_t select_tokens_workspace(const SelectTokens& op) {
  return plan(op, nullptr).bytes;
}

void select_tokens_cuda(const SelectTokens& op, void* workspace, void* stream) {
  const Plan planned = plan(op, static_cast<char*>(workspace));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (is_long(op)) return launch_long(planned, workspace, cuda_stream);
  dispatch_float(op.dtype, [&](auto type) {
    launch_kernel(select_tokens_kernel<typename decltype(type)::type>, grid_of(op.batch), kRowThreads,
                  static_cast<size_t>(static_cast<int64_t>(sizeof(TopShared)) + staged_bytes(op.seq_len)),
                  cuda_stream, planned.rows.select, "select_tokens");
  });
}

}  // namespace livevlm
