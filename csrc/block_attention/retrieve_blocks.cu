// SPDX-License-Identifier: Apache-2.0
#include "block_attention/retrieve_blocks.cuh"

#include "block_attention/block_scores.cuh"
#include "block_attention/block_shares_fma.cuh"
#include "block_attention/block_shares_mma.cuh"
#include "block_attention/retrieval_plan.cuh"
#include "block_attention/top_blocks.cuh"

namespace livevlm {
namespace {

template <typename T, int kSize, int kBlocks, bool kMinMax>
void launch_scores(RetrieveKernel kernel, bool mean_query, cudaStream_t stream) {
  kernel.row_tiles = static_cast<int32_t>(ceil_div(kernel.num_blocks, kScoreBlocksWarps * kBlocks));
  const RetrieveBlocks& op = kernel.op;
  const dim3 grid = grid_of((op.per_head ? op.batch * op.num_heads : op.batch) * kernel.row_tiles);
  const auto shared = static_cast<size_t>(kernel.chunk_heads * summary_length(op)) * sizeof(float);
  // Without a mean of queries the kernel ahead is not of this op, and there is nothing to overlap with.
  const auto launch = mean_query ? &launch_overlapping<RetrieveKernel> : &launch_kernel<RetrieveKernel>;
  launch(score_blocks_kernel<T, kSize, kBlocks, kMinMax>, grid, kScoreBlocksThreads, shared, stream, kernel,
         "retrieve_blocks: scores");
}

void launch_query(const RetrievalPlan& all, cudaStream_t stream) {
  const RetrieveKernel& kernel = all.kernel;
  const RetrieveBlocks& op = kernel.op;
  if (all.mean_query) {
    dispatch_float(op.q_dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const int64_t pieces = op.batch * op.num_heads * op.group_size * ceil_div(op.head_dim, 32);
      launch_kernel(mean_query_kernel<T>, grid_of(pieces), kMeanThreads, 0, stream, kernel,
                    "retrieve_blocks: mean query");
    });
  }
  dispatch_float(op.keys_dtype, [&](auto type) {
    dispatch_bool(has_bounds(op), [&](auto bounds) {
      using T = typename decltype(type)::type;
      constexpr bool kMinMax = decltype(bounds)::value;
      // With few blocks, a warp has one: then there are enough warps for the whole GPU.
      constexpr int kMany = 6;
      const bool many = kernel.num_blocks >= kManyBlocks;
      if (!aligned_keys(op)) return launch_scores<T, 1, 1, kMinMax>(kernel, all.mean_query, stream);
      if (many) return launch_scores<T, kVectorSize<T>, kMany, kMinMax>(kernel, all.mean_query, stream);
      launch_scores<T, kVectorSize<T>, 1, kMinMax>(kernel, all.mean_query, stream);
    });
  });
}

// As many rows at a time as shared memory holds, in blocks of about the same size.
void plan_rows(RetrieveKernel& kernel, int64_t most, int64_t multiple) {
  const int64_t blocks = ceil_div(kernel.num_rows, std::max(most / multiple, int64_t{1}) * multiple);
  kernel.block_rows = static_cast<int32_t>(ceil_div(ceil_div(kernel.num_rows, blocks), multiple) * multiple);
}

template <typename T, typename K, int kDim, bool kMinMax>
void launch_mma(RetrieveKernel kernel, dim3 grid, cudaStream_t stream) {
  using Shape = ShareShape<T, K, kDim, kMinMax>;
  constexpr int64_t kExchange = kShareWarps * Shape::kWarpKeys * 4;
  const int64_t row = Shape::kRowBytes + 2 * kernel.key_warps * static_cast<int64_t>(sizeof(float));
  plan_rows(kernel, (max_shared_bytes() - kExchange) / row, kShareRows);
  const auto shared = static_cast<size_t>(kernel.block_rows * row + kExchange);
  launch_kernel(share_mma_kernel<T, K, kDim, kMinMax, false>, grid, kShareThreads, shared, stream, kernel,
                "retrieve_blocks: sums");
  launch_overlapping(share_mma_kernel<T, K, kDim, kMinMax, true>, grid, kShareThreads, shared, stream, kernel,
                     "retrieve_blocks: shares");
}

template <typename T, typename K>
void launch_mma(const RetrieveKernel& kernel, dim3 grid, cudaStream_t stream) {
  const auto with_dim = [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    if constexpr (sizeof(K) == sizeof(T)) {
      if (has_bounds(kernel.op)) return launch_mma<T, K, kDim, true>(kernel, grid, stream);
    }
    launch_mma<T, K, kDim, false>(kernel, grid, stream);
  };
  kernel.op.head_dim == 128 ? with_dim(IntTag<128>{}) : with_dim(IntTag<64>{});
}

void launch_fma(RetrieveKernel kernel, dim3 grid, cudaStream_t stream) {
  constexpr int64_t kMostRows = 2048;
  plan_rows(kernel, kMostRows, 1);
  const auto shared =
      static_cast<size_t>(share_fma_floats(summary_length(kernel.op), kernel.block_rows)) * sizeof(float);
  launch_kernel(share_fma_kernel<false>, grid, kFmaShareThreads, shared, stream, kernel,
                "retrieve_blocks: sums");
  launch_overlapping(share_fma_kernel<true>, grid, kFmaShareThreads, shared, stream, kernel,
                     "retrieve_blocks: shares");
}

void launch_softmax(const RetrieveKernel& kernel, cudaStream_t stream) {
  const RetrieveBlocks& op = kernel.op;
  const dim3 grid = grid_of(op.batch * op.num_heads * kernel.num_splits);
  if (!uses_mma(op)) return launch_fma(kernel, grid, stream);
  if (op.q_dtype == DType::kFloat16) return launch_mma<__half, __half>(kernel, grid, stream);
  if (op.keys_dtype == DType::kFloat32) return launch_mma<__nv_bfloat16, float>(kernel, grid, stream);
  launch_mma<__nv_bfloat16, __nv_bfloat16>(kernel, grid, stream);
}

// Launches `pick` in the largest clusters that the GPU has a place for; bytes(cluster size): of shared
// memory. False if it has none.
template <typename Bytes>
bool launch_clusters(void (*pick)(RetrieveKernel), RetrieveKernel kernel, Bytes bytes, cudaStream_t stream) {
  constexpr const char* kName = "retrieve_blocks: selection";
  const int64_t rows = kernel.op.batch * (kernel.op.per_head ? kernel.op.num_heads : 1);
#ifndef LIVEVLM_EMULATED
  if (built_for_hopper(pick, kName)) {
    for (int size = kMostRanks; size >= kMostRanks / 2; size /= 2) {
      kernel.cluster_size = size;
      if (bytes(size) > max_shared_bytes()) continue;
      HopperLaunch<RetrieveKernel> launch(pick, grid_of(rows * size), kManyThreads,
                                          static_cast<size_t>(bytes(size)), stream, size, kName);
      if (!launch.fits()) continue;
      launch.run(kernel);
      return true;
    }
  }
#endif
  kernel.cluster_size = 1;
  if (bytes(1) > max_shared_bytes()) return false;
  launch_overlapping(pick, grid_of(rows), kManyThreads, static_cast<size_t>(bytes(1)), stream, kernel, kName);
  return true;
}

void launch_many(const RetrieveKernel& kernel, cudaStream_t stream) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(ClusterShared));
  const auto staged = [&](int64_t size) {
    return kBytes + ceil_div(kernel.num_blocks, size) * static_cast<int64_t>(sizeof(uint32_t));
  };
  if (launch_clusters(pick_many_blocks_kernel<true>, kernel, staged, stream)) return;
  launch_clusters(pick_many_blocks_kernel<false>, kernel, [](int64_t) { return kBytes; }, stream);
}

void launch_top(const RetrieveKernel& kernel, cudaStream_t stream) {
  if (kernel.num_blocks > kFewBlocks) return launch_many(kernel, stream);
  const int64_t rows = kernel.op.batch * (kernel.op.per_head ? kernel.op.num_heads : 1);
  const int64_t bytes = static_cast<int64_t>(sizeof(PickShared)) + mark_bytes(kernel.num_blocks);
  const auto launch = [&](auto pick, int threads) {
    launch_overlapping(pick, grid_of(rows), threads, static_cast<size_t>(bytes), stream, kernel,
                       "retrieve_blocks: selection");
  };
  // Few threads have less to wait for each other; more have more of a long row on its way.
  if (kernel.num_blocks <= 256 * 4) return launch(pick_few_blocks_kernel<256, 4, 4>, 256);
  launch(pick_few_blocks_kernel<512, 8, 4>, 512);
  static_assert(kFewBlocks == 512 * 8);
}

}  // namespace

int64_t retrieve_blocks_workspace(const RetrieveBlocks& op) {
  return plan_retrieval(op, nullptr).bytes;
}

void retrieve_blocks_cuda(const RetrieveBlocks& op, void* workspace, void* stream) {
  const RetrievalPlan all = plan_retrieval(op, workspace);
  const RetrieveKernel& kernel = all.kernel;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (op.kind == BlockScore::kMass) {
    score_tokens_cuda(mass_of(op, kernel.parts), all.mass_workspace, stream);
  } else if (op.softmax) {
    launch_softmax(kernel, cuda_stream);
  } else {
    launch_query(all, cuda_stream);
  }
  if (all.add_parts) {
    const int64_t scores = op.batch * (op.per_head ? op.num_heads : 1) * kernel.num_blocks;
    launch_overlapping(add_parts_kernel<kAddThreads>, grid_of(ceil_div(scores, kAddThreads / kAddLanes)),
                       kAddThreads, 0, cuda_stream, kernel, "retrieve_blocks: sums of parts");
  }
  launch_top(kernel, cuda_stream);
}

}  // namespace livevlm
