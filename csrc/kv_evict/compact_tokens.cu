// SPDX-License-Identifier: Apache-2.0
#include "kv_evict/compact_tokens.cuh"

#include <algorithm>

#include "common/cuda_launch.cuh"

namespace livevlm {
namespace {

struct CompactKernel {
  CompactTokens op;
  CompactPlan plans[kMaxCompactTensors];
  uint32_t* ticket;  // zero before the launch, as are the flags; null if no block waits for another
  uint32_t* flags;
};

__global__ void __launch_bounds__(kCompactThreads, 4)
    compact_tokens_kernel(const __grid_constant__ CompactKernel p) {
  wait_for_previous_kernels();
  const int64_t ticket = p.ticket ? take_ticket(p.ticket) : blockIdx.x;
  int tensor = 0;
  while (tensor + 1 < p.op.num_tensors && ticket >= p.plans[tensor + 1].first_ticket) ++tensor;
  const CompactPlan& plan = p.plans[tensor];
  move_place(p.op.tensors[tensor], plan, p.op, static_cast<uint32_t>(ticket - plan.first_ticket), p.flags);
}

constexpr int64_t kTicketBytes = 16;
// Wide columns read memory in long pieces; many blocks, each with up to 32 KiB on the way, keep it busy. On
// an H100 columns of 64 bytes are still worth it where wider ones are too few.
constexpr int64_t kColumnBytes = 256, kMinColumnBytes = 64;
constexpr int64_t kManyBlocks = 192;  // what columns wider than the narrowest must come to
constexpr int64_t kFewBlocks = 128;  // with fewer of the narrowest, chunks of all columns are taken by ticket

int64_t row_bytes(const Rows& rows) {
  return rows.num_units * rows.unit;
}

// The width of columns that are one block's, of rows that are as wide; 0 if there are too few for that.
int64_t column_bytes(const CompactTokens& op) {
  int64_t all = 0;  // columns of a byte
  for (int i = 0; i < op.num_tensors; ++i) all += op.batch * op.num_heads * row_bytes(op.tensors[i]);
  int64_t bytes = kColumnBytes;
  while (bytes > kMinColumnBytes && all / bytes < kManyBlocks) bytes /= 2;
  return all / bytes < kFewBlocks ? 0 : bytes;
}

struct Sizes {
  int64_t blocks, flags;
};

// Fills in everything but pointers to scratch memory.
Sizes plan(const CompactTokens& op, CompactKernel& kernel) {
  kernel.op = op;
  Rows* rows = kernel.op.tensors;
  // Wide rows first: what small ones take then fills gaps at the end.
  std::stable_sort(rows, rows + op.num_tensors,
                   [](const Rows& a, const Rows& b) { return row_bytes(a) > row_bytes(b); });
  const int64_t columns = column_bytes(op);
  // With tickets small rows come first: their few chunks are then not what everything waits for at the end.
  if (columns == 0) std::reverse(rows, rows + op.num_tensors);
  int64_t tickets = 0;
  bool waits = false;
  for (int i = 0; i < op.num_tensors; ++i) {
    kernel.plans[i] = plan_compaction(rows[i], op.batch * op.num_heads, op.num_kept, columns, tickets);
    tickets += kernel.plans[i].num_tickets();
    waits |= kernel.plans[i].num_blocks > 1;
  }
  return {tickets, waits ? tickets : 0};
}

int64_t workspace_bytes(const Sizes& sizes) {
  return sizes.flags == 0 ? 0 : kTicketBytes + sizes.flags * static_cast<int64_t>(sizeof(uint32_t));
}

void move(const CompactTokens& op, void* workspace, cudaStream_t stream, bool behind) {
  CompactKernel kernel;
  const Sizes sizes = plan(op, kernel);
  const int64_t bytes = workspace_bytes(sizes);
  kernel.ticket = bytes > 0 ? static_cast<uint32_t*>(workspace) : nullptr;
  kernel.flags = kernel.ticket + (bytes > 0 ? kTicketBytes / sizeof(uint32_t) : 0);
  if (bytes > 0 && !behind) zero(workspace, bytes, stream);
  const auto launch = behind ? launch_overlapping<CompactKernel> : launch_kernel<CompactKernel>;
  launch(compact_tokens_kernel, grid_of(sizes.blocks), kCompactThreads, 0, stream, kernel, "compact_tokens");
}

}  // namespace

int64_t compact_tokens_workspace(const CompactTokens& op) {
  CompactKernel kernel;
  return workspace_bytes(plan(op, kernel));
}

void compact_tokens_cuda(const CompactTokens& op, void* workspace, void* stream) {
  move(op, workspace, static_cast<cudaStream_t>(stream), false);
}

void compact_tokens_behind(const CompactTokens& op, void* workspace, void* stream) {
  move(op, workspace, static_cast<cudaStream_t>(stream), true);
}

}  // namespace livevlm
