// SPDX-License-Identifier: Apache-2.0
#include "kv_evict/compact_tokens.cuh"

#include <algorithm>

#include "common/cuda_launch.cuh"

namespace livevlm {
namespace {

struct CompactKernel {
  CompactTokens op;
  CompactPlan plans[kMaxCompactTensors];
  uint32_t* ticket;  // zero before the launch, as are the flags
  uint32_t* flags;
};

__global__ void __launch_bounds__(kCompactThreads, 4)
    compact_tokens_kernel(const __grid_constant__ CompactKernel p) {
  const int64_t ticket = take_ticket(p.ticket);
  int tensor = 0;
  while (tensor + 1 < p.op.num_tensors && ticket >= p.plans[tensor + 1].first_ticket) ++tensor;
  const CompactPlan& plan = p.plans[tensor];
  compact_chunk(p.op.tensors[tensor], plan, p.op.indices, p.op.num_heads, p.op.num_kept, p.op.seq_len,
                static_cast<uint32_t>(ticket - plan.first_ticket), p.flags);
}

constexpr int64_t kTicketBytes = 16;

// Fills in everything but pointers to scratch memory; returns the number of tickets.
int64_t plan(const CompactTokens& op, CompactKernel& kernel) {
  kernel.op = op;
  // Small rows first: the few chunks that they come to are then not what everything waits for at the end.
  std::stable_sort(kernel.op.tensors, kernel.op.tensors + op.num_tensors,
                   [](const Rows& a, const Rows& b) { return a.num_units * a.unit < b.num_units * b.unit; });
  int64_t tickets = 0;
  for (int i = 0; i < op.num_tensors; ++i) {
    kernel.plans[i] = plan_compaction(kernel.op.tensors[i], op.batch * op.num_heads, op.num_kept, tickets);
    tickets += kernel.plans[i].num_tickets();
  }
  return tickets;
}

}  // namespace

int64_t compact_tokens_workspace(const CompactTokens& op) {
  CompactKernel kernel;
  return kTicketBytes + plan(op, kernel) * static_cast<int64_t>(sizeof(uint32_t));
}

void compact_tokens_cuda(const CompactTokens& op, void* workspace, void* stream) {
  CompactKernel kernel;
  const int64_t tickets = plan(op, kernel);
  kernel.ticket = static_cast<uint32_t*>(workspace);
  kernel.flags = kernel.ticket + kTicketBytes / sizeof(uint32_t);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  zero(workspace, kTicketBytes + tickets * static_cast<int64_t>(sizeof(uint32_t)), cuda_stream);
  launch_kernel(compact_tokens_kernel, grid_of(tickets), kCompactThreads, 0, cuda_stream, kernel,
                "compact_tokens");
}

}  // namespace livevlm
