// SPDX-License-Identifier: Apache-2.0
#include "kv_merge/merge_tokens.cuh"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "common/cuda_launch.cuh"
#include "kv_merge/nearest_fma.cuh"
#include "kv_merge/nearest_mma.cuh"
#ifndef LIVEVLM_EMULATED
#include "kv_merge/nearest_wgmma.cuh"
#endif
#include "kv_merge/order_by_group.cuh"

namespace livevlm {
namespace {

// Up to this many rows of the result, every block goes through all groups of its row: 4 bytes a token and
// row, little beside the keys and values, and one kernel less.
constexpr int64_t kFewGroups = 48;

struct Plan {
  NearestKernel nearest;
  OrderKernel order;
  bool order_shared;      // counts are in shared memory
  int64_t zeroed, bytes;  // of scratch memory, and the part at its front that starts as zeros
};

bool sorts(const MergeTokens& op) {
  return op.indices || op.num_groups > kFewGroups;
}

Plan plan(const MergeTokens& op, char* workspace) {
  Plan plan{};
  int64_t at = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(workspace + at);
    at += ceil_div(count * static_cast<int64_t>(sizeof(*pointer)), 16) * 16;
  };
  if (!sorts(op)) return plan;
  const int64_t tokens = op.batch * op.seq_len;
  plan.order = {.groups = op.groups,
                .nearest = nullptr,
                .seq_lens = op.seq_lens,
                .batch = op.batch,
                .seq_len = op.seq_len,
                .num_groups = op.num_groups,
                .counts = nullptr,
                .order = nullptr,
                .starts = nullptr};
  plan.nearest.op = op;
  plan.order_shared = order_shared_bytes(op.num_groups) <= max_shared_bytes() - 1024;
  if (op.indices) {
    take(plan.nearest.nearest, tokens);
    take(plan.nearest.num_tiles, 1);
  }
  plan.zeroed = at;
  take(plan.order.counts, op.batch * kOrderWarps * op.num_groups);
  if (!plan.order_shared) plan.zeroed = at;
  take(plan.order.order, tokens);
  take(plan.order.starts, op.batch * (op.num_groups + 1));
  if (op.indices) {
    plan.order.nearest = plan.nearest.nearest;
    take(plan.nearest.orphans, tokens);
    take(plan.nearest.num_orphans, op.batch);
    take(plan.nearest.tiles, op.batch * ceil_div(op.seq_len, kTileOrphans));
    take(plan.nearest.inverses, op.batch * op.num_groups);
  }
  plan.bytes = at;
  return plan;
}

// Launches `kernel` over tiles of orphans and parts of the survivors: parts of one tile only until every
// multiprocessor has a block, of more until there are so many that the last ones matter little.
void launch_nearest(void (*kernel)(NearestKernel), NearestKernel p, int64_t orphans, int64_t rows,
                    int threads, int64_t shared_bytes, cudaStream_t stream) {
  constexpr int64_t kEachBusy = 132, kEven = 768;
  const int64_t tiles = ceil_div(p.op.seq_len, orphans), survivor_tiles = ceil_div(p.op.num_groups, rows);
  // Usually about half of the tokens are orphans; blocks without any return at once.
  const int64_t busy = std::max<int64_t>(1, p.op.batch * tiles / 2);
  const int64_t parts = std::max(std::min(ceil_div(kEachBusy, busy), survivor_tiles),
                                 std::min(ceil_div(kEven, busy), survivor_tiles / 2));
  p.survivor_parts = static_cast<uint32_t>(parts);
  launch_kernel(kernel, grid_of(p.op.batch * tiles * parts), threads, static_cast<size_t>(shared_bytes),
                stream, p, "merge_tokens: nearest survivors");
}

#ifndef LIVEVLM_EMULATED
// Warpgroup products exist on Hopper alone. LIVEVLM_NEAREST=mma in the environment turns them off, so that
// tests on Hopper reach the other kernel too.
bool uses_wgmma() {
  static const bool allowed = [] {
    const char* wanted = std::getenv("LIVEVLM_NEAREST");
    return !(wanted && std::string_view(wanted) == "mma");
  }();
  return allowed && has_warpgroup_products();
}

// One block a multiprocessor, with as many stages as there is room for; false if there are too few. This
// follows from the size of a key alone: a token's nearest must not depend on what else is in the batch.
template <typename T>
bool launch_wgmma(const NearestKernel& p, cudaStream_t stream) {
  const MergeTokens& op = p.op;
  const int64_t chunks = ceil_div(op.num_heads * op.head_dim, kPanelElements), most = max_shared_bytes();
  int64_t stages = kMostStages;
  const auto slots = [&] { return ceil_div(stages, chunks); };
  const auto bytes = [&] { return nearest_wgmma_bytes(chunks, stages, slots()); };
  while (stages >= kFewestStages && bytes() > most) --stages;
  if (stages < kFewestStages) return false;
  const NearestWgmmaKernel kernel{p, static_cast<int32_t>(chunks), static_cast<int32_t>(stages),
                                  static_cast<int32_t>(slots())};
  const int64_t steps =
      op.batch * ceil_div(op.seq_len, kTileOrphans) * ceil_div(op.num_groups, kTileSurvivors);
  const int64_t blocks = std::min(steps, device_attribute(cudaDevAttrMultiProcessorCount));
  launch_kernel(nearest_wgmma_kernel<T>, grid_of(blocks), kNearestThreads, static_cast<size_t>(bytes()),
                stream, kernel, "merge_tokens: nearest survivors");
  return true;
}
#endif

template <typename T>
void find_nearest(const NearestKernel& p, cudaStream_t stream) {
  const MergeTokens& op = p.op;
  constexpr int64_t kWarps = kPrepareThreads / 32;
  const bool wide = vectorised(op.k, op.head_dim, sizeof(T));
  const int64_t blocks = op.batch + ceil_div(op.batch * op.num_groups, kWarps);
  launch_kernel(wide ? prepare_nearest_kernel<T, kVectorSize<T>> : prepare_nearest_kernel<T, 1>,
                grid_of(blocks), kPrepareThreads, 0, stream, p, "merge_tokens: survivors");
  if constexpr (sizeof(T) == 2) {
#ifndef LIVEVLM_EMULATED
    if (wide && uses_wgmma() && launch_wgmma<T>(p, stream)) return;
#endif
    const int64_t chunks = ceil_div(op.num_heads * op.head_dim, kMmaDepth), most = max_shared_bytes();
    const auto launch = [&](auto tile) {
      constexpr int kOrphans = decltype(tile)::value;
      const int64_t shared = mma_dynamic_bytes(kOrphans, chunks);
      if (!wide || shared + kMmaStaticBytes<kOrphans> > most) return false;
      launch_nearest(nearest_mma_kernel<T, kOrphans>, p, kOrphans, kMmaRows, kMmaThreads, shared, stream);
      return true;
    };
    if (launch(IntTag<128>{}) || launch(IntTag<64>{})) return;
  }
  launch_nearest(nearest_fma_kernel<T>, p, kFmaTile, kFmaTile, kFmaThreads, 0, stream);
}

template <typename T, int kSize, int kColumns>
void launch_means(MergeKernel p, cudaStream_t stream) {
  const int64_t columns = ceil_div(2 * p.op.num_heads * p.op.head_dim / kSize, kColumns);
  const int64_t groups = p.starts ? ceil_div(p.op.num_groups, kSortedThreads / kColumns) : p.op.num_groups;
  p.column_blocks = static_cast<uint32_t>(columns);
  p.group_blocks = static_cast<uint32_t>(groups);
  launch_kernel(p.starts ? merge_sorted_kernel<T, kSize, kColumns> : merge_scanned_kernel<T, kSize, kColumns>,
                grid_of(p.op.batch * groups * columns), p.starts ? kSortedThreads : kScanThreads, 0, stream,
                p, "merge_tokens");
}

// Few columns: more threads share one.
template <typename T, int kSize>
void find_means(const MergeKernel& p, cudaStream_t stream) {
  const int64_t width = p.op.num_heads * p.op.head_dim;
  if (width > INT32_MAX / 2) throw std::runtime_error("merge_tokens: tokens of 2^30 elements or more");
  2 * width / kSize <= 32 ? launch_means<T, kSize, 32>(p, stream) : launch_means<T, kSize, 64>(p, stream);
}

}  // namespace

int64_t merge_tokens_workspace(const MergeTokens& op) {
  return plan(op, nullptr).bytes;
}

void merge_tokens_cuda(const MergeTokens& op, void* workspace, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const Plan planned = plan(op, static_cast<char*>(workspace));
  const bool sorted = sorts(op);
  if (planned.zeroed > 0) zero(workspace, planned.zeroed, cuda_stream);
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (op.indices) find_nearest<T>(planned.nearest, cuda_stream);
    if (sorted) {
      launch_kernel(planned.order_shared ? order_by_group_kernel<true> : order_by_group_kernel<false>,
                    grid_of(op.batch), kOrderThreads,
                    planned.order_shared ? order_shared_bytes(op.num_groups) : 0, cuda_stream, planned.order,
                    "merge_tokens: order");
    }
    const MergeKernel kernel{op, sorted ? planned.order.order : nullptr,
                             sorted ? planned.order.starts : nullptr, 0, 0};
    const bool wide = vectorised(op.k, op.head_dim, sizeof(T)) && vectorised(op.v, op.head_dim, sizeof(T));
    wide ? find_means<T, kVectorSize<T>>(kernel, cuda_stream) : find_means<T, 1>(kernel, cuda_stream);
  });
}

}  // namespace livevlm
