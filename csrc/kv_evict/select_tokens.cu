// SPDX-License-Identifier: Apache-2.0
#include "kv_evict/select_tokens.cuh"

namespace livevlm {
namespace {

// Splits the workspace; returns its size.
int64_t plan(const SelectTokens& op, char* workspace, SelectKernel& kernel) {
  kernel.op = op;
  kernel.index_bits = 4;
  while ((int64_t{1} << kernel.index_bits) < op.seq_len) kernel.index_bits += 4;
  kernel.words = ceil_div(op.seq_len, 32);
  const bool walks = op.num_top < op.budget;
  // By place, more buckets than tokens change nothing: every token already has its own.
  if (!op.buckets && op.num_buckets > op.seq_len) kernel.op.num_buckets = op.seq_len;
  const int64_t buckets = walks ? op.batch * kernel.op.num_buckets : 0;
  const int64_t thresholds = buckets * 8, second = walks ? op.batch * kernel.words * 4 : 0;
  kernel.thresholds = reinterpret_cast<unsigned long long*>(workspace);
  kernel.second = reinterpret_cast<uint32_t*>(workspace + thresholds);
  kernel.digits = reinterpret_cast<uint32_t*>(workspace + thresholds + second);
  return thresholds + second + (op.bucket_capacity > 1 ? buckets * 17 * 4 : 0);
}

}  // namespace

int64_t select_tokens_workspace(const SelectTokens& op) {
  SelectKernel kernel;
  return plan(op, nullptr, kernel);
}

void select_tokens_cuda(const SelectTokens& op, void* workspace, void* stream) {
  SelectKernel kernel;
  plan(op, static_cast<char*>(workspace), kernel);
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_staged(op.seq_len, sizeof(TopShared), [&](auto staged, int64_t shared_bytes) {
      launch_kernel(select_tokens_kernel<T, decltype(staged)::value>, grid_of(op.batch), kRowThreads,
                    static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream), kernel,
                    "select_tokens");
    });
  });
}

}  // namespace livevlm
