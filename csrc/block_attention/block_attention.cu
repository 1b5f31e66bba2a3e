// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "block_attention/attend_codes_launch.cuh"
#include "block_attention/attend_fma.cuh"
#include "block_attention/attend_mma.cuh"
#include "block_attention/attend_tiles_launch.cuh"
#include "block_attention/combine_rows.cuh"
#include "block_attention/combine_splits.cuh"
#include "common/cuda_launch.cuh"

namespace livevlm {
namespace {

// Whether all pieces of 16 bytes of a pool can be counted in 32 bits: of 64 GiB.
bool countable(const Tokens& tokens, const BlockAttention& op) {
  return (op.num_blocks - 1) * tokens.stride_batch + (op.block_size - 1) * tokens.stride_token <
         int64_t{UINT32_MAX} * elements_of_piece(op);
}

// Keys and values in pieces of 16 bytes, in products of 16-bit floats. Of int4, a step of keys brings the
// pairs of two blocks.
bool uses_mma(const BlockAttention& op) {
  return countable(op.k, op) && countable(op.v, op) && op.dtype != DType::kFloat32 &&
         (op.head_dim == 64 || op.head_dim == 128) && vectorised(op.q, op.head_dim, 2) &&
         pools_vectorised(op) && (op.format != PoolFormat::kInt4 || op.block_size >= kStepKeys) &&
         (!op.cos_sin_cache || aligned16(op.cos_sin_cache));
}

// The kernels for many rows.
bool uses_tiles(const BlockAttention& op) {
  return uses_mma(op) && tiles_fit(op);
}

// Splits keep a GPU busy with a single sequence: a thread block a multiprocessor, a warp for each part. Their
// number must not follow from the batch, nor from how wide the table is. A power of two: warps combine them
// in turns.
int32_t most_splits(const BlockAttention& op) {
  const int64_t busy = device_attribute(cudaDevAttrMultiProcessorCount) / op.num_heads;
  int32_t splits = 1;
  while (splits * 2 <= busy) splits *= 2;
  return splits;
}

// Numbers of tiles: see tile_of.
void plan_tiles(AttentionKernel& kernel) {
  const BlockAttention& op = kernel.op;
  int64_t tiles = op.total_q * op.group_size / kernel.tile_rows + op.batch;
  kernel.tile_a_query = op.group_size <= kernel.tile_rows && op.total_q < tiles;
  if (!op.cu_seqlens_q) {
    const int64_t each = ceil_div(op.total_q / op.batch * op.group_size, kernel.tile_rows);
    kernel.tiles_each = Divisor(each);
    tiles = each * op.batch;
  } else if (kernel.tile_a_query) {
    tiles = op.total_q;
  }
  kernel.num_tiles = static_cast<int32_t>(tiles);
}

// How full so many warps keep the GPU, from start to end.
double fullness(int64_t warps, int64_t multiprocessors) {
  const int64_t blocks = ceil_div(warps, 4), at_once = 2 * multiprocessors;
  return static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, at_once) * at_once);
}

// Whether a thread block's shared memory is there.
template <WarpWork kWork>
bool fits(int64_t head_dim) {
  const int bytes = head_dim <= 64 ? kFewWarpBytes<64, kWork> : kFewWarpBytes<128, kWork>;
  return kFewWarps<kWork> * bytes <= max_shared_bytes();
}

// What keeps the GPU busy, if sequences are as long as their tables: see WarpWork.
WarpWork warp_work(const AttentionKernel& kernel) {
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t steps = ceil_div(kernel.op.max_blocks * kernel.op.block_size, kStepKeys);
  const int64_t each = ceil_div(steps, kernel.most_parts.value);  // of a part
  const int64_t splits = ceil_div(steps, each * kParts), tiles = kernel.num_tiles * kernel.op.num_heads;
  if (tiles * splits < 3 * multiprocessors && fits<WarpWork::kPart>(kernel.op.head_dim))
    return WarpWork::kPart;
  if (!fits<WarpWork::kSplits>(kernel.op.head_dim)) return WarpWork::kSplit;
  const double many = fullness(tiles * ceil_div(splits, kTogether), multiprocessors);
  return many > 0.9 || many > fullness(tiles * splits, multiprocessors) ? WarpWork::kSplits
                                                                        : WarpWork::kSplit;
}

struct Plan {
  AttentionKernel kernel;  // for few rows
  bool few, many;          // which kernels may have something to do
  WarpWork work;
  int64_t found_bytes, bytes;
};

// How much room what is found takes: numbers of (row, split), for a KV head.
int64_t plan_found(AttentionKernel& kernel) {
  const BlockAttention& op = kernel.op;
  const int64_t rows = op.total_q * op.group_size;
  if (!op.cu_seqlens_q) {
    const int64_t each = rows / op.batch;
    kernel.found_region =
        each * ceil_div(std::min<int64_t>(splits_of_rows(kernel, each), kernel.num_splits), kernel.together);
    return op.batch * kernel.found_region;
  }
  // Many rows have few splits: see splits_of_rows.
  const int64_t busy = int64_t{kernel.tile_splits} * kManyRows;
  const int64_t region = std::clamp(rows * kernel.even_splits, busy, kEvenWaves * busy);
  const int64_t packed = rows * kernel.num_found.value;
  kernel.found_region = op.batch * region < packed ? region : 0;
  return std::min(op.batch * region, packed);
}

Plan plan(const BlockAttention& op, char* workspace) {
  Plan plan{};
  AttentionKernel& kernel = plan.kernel;
  kernel.op = op;
  kernel.block_size = Divisor(op.block_size), kernel.num_heads = Divisor(op.num_heads);
  kernel.group_size = Divisor(op.group_size), kernel.num_qo_heads = Divisor(op.num_heads * op.group_size);
  kernel.queries_each = Divisor(op.cu_seqlens_q ? 1 : op.total_q / op.batch);
  kernel.most_keys = static_cast<int32_t>(std::min(op.max_blocks * op.block_size, kMostKeys));
  if (uses_mma(op)) {
    const int64_t piece = elements_of_piece(op);
    kernel.k_block = static_cast<uint32_t>(op.k.stride_batch / piece);
    kernel.k_slot = static_cast<uint32_t>(op.k.stride_token / piece);
    kernel.v_block = static_cast<uint32_t>(op.v.stride_batch / piece);
    kernel.v_slot = static_cast<uint32_t>(op.v.stride_token / piece);
  }
  kernel.scale = op.sm_scale * 1.4426950408889634f;
  const int64_t rows = op.cu_seqlens_q ? op.total_q * op.group_size : op.total_q / op.batch * op.group_size;
  plan.many = uses_tiles(op) && rows > kFewest;
  plan.few = op.cu_seqlens_q || !plan.many;
  kernel.min_rows = 1, kernel.max_rows = plan.many ? kFewest : INT32_MAX;
  kernel.many_apart = plan.many;
  kernel.tile_rows = uses_mma(op) ? kFewRows : kFmaRows;
  plan_tiles(kernel);
  kernel.most_splits = most_splits(op);
  kernel.most_parts = Divisor(int64_t{kernel.most_splits} * kParts);
  kernel.tile_splits = kernel.most_splits, kernel.half_rows = 0, kernel.even_splits = 1;
  if (plan.many) {
    const int64_t blocks = uses_warpgroups() ? 1 : 2;  // of a multiprocessor
    const int64_t fit = blocks * device_attribute(cudaDevAttrMultiProcessorCount) / op.num_heads;
    kernel.tile_splits = static_cast<int32_t>(std::max<int64_t>(fit, 1));
    kernel.half_rows = uses_warpgroups() ? 0 : kGatheredRows;
    kernel.even_splits = std::min(3, kernel.most_splits);
  }
  kernel.num_splits = static_cast<int32_t>(
      std::min<int64_t>(kernel.most_splits, ceil_div(op.max_blocks * op.block_size, kStepKeys * kParts)));
  plan.work = warp_work(kernel);
  // Kernels for other rows write what they find split by split.
  if (plan.many && plan.work == WarpWork::kSplits) plan.work = WarpWork::kSplit;
  kernel.together = uses_mma(op) && plan.work == WarpWork::kSplits ? kTogether : 1;
  kernel.num_found = Divisor(ceil_div(kernel.num_splits, kernel.together));
  const int64_t found = plan_found(kernel) * op.num_heads;
  kernel.found_out = reinterpret_cast<float*>(workspace);
  const int64_t out_bytes = ceil_div(found * op.head_dim * 4, 16) * 16;
  kernel.found_sums = reinterpret_cast<float2*>(workspace + out_bytes);
  plan.found_bytes = ceil_div(out_bytes + found * static_cast<int64_t>(sizeof(float2)), 128) * 128;
  plan.bytes = plan.found_bytes + (plan.many ? tiles_workspace(kernel) : 0);
  return plan;
}

template <typename T, int kDim, typename Angle, WarpWork kWork>
void launch_mma(const AttentionKernel& kernel, cudaStream_t stream) {
  constexpr int kWarps = kFewWarps<kWork>,
                kItems = kWork == WarpWork::kPart ? 1 : kWarps;  // of a thread block
  const int64_t items = int64_t{kernel.num_tiles} * kernel.op.num_heads * kernel.num_found.value;
  launch_overlapping(attend_mma_kernel<T, kDim, Angle, kWork>, grid_of(ceil_div(items, kItems)), 32 * kWarps,
                     kWarps * kFewWarpBytes<kDim, kWork>, stream, kernel, "block_attention");
}

template <typename T, int kDim, typename Angle>
void launch_mma(const Plan& plan, cudaStream_t stream) {
  switch (plan.work) {
    case WarpWork::kPart:
      return launch_mma<T, kDim, Angle, WarpWork::kPart>(plan.kernel, stream);
    case WarpWork::kSplit:
      return launch_mma<T, kDim, Angle, WarpWork::kSplit>(plan.kernel, stream);
    case WarpWork::kSplits:
      return launch_mma<T, kDim, Angle, WarpWork::kSplits>(plan.kernel, stream);
  }
}

template <typename T, int kDim>
void launch_mma(const Plan& plan, cudaStream_t stream) {
  if (!plan.kernel.op.cos_sin_cache) return launch_mma<T, kDim, NoAngles>(plan, stream);
  if (plan.kernel.op.cos_sin_half) return launch_mma<T, kDim, HalfAngles>(plan, stream);
  launch_mma<T, kDim, FloatAngles>(plan, stream);
}

// What many rows found.
template <typename T>
void launch_combine_rows(AttentionKernel kernel, cudaStream_t stream) {
  const BlockAttention& op = kernel.op;
  if (!op.cu_seqlens_q && splits_of_rows(kernel, op.total_q / op.batch * op.group_size) == 1) return;
  kernel.min_rows = kernel.max_rows + 1;
  const int64_t blocks = ceil_div(op.total_q * op.num_heads * op.group_size, kCombineRows);
  // On Hopper few blocks are to be spread over the GPU, and not to gather where there is room first: they ask
  // for more than half of the shared memory of a multiprocessor.
  const bool spread = uses_warpgroups() && blocks <= device_attribute(cudaDevAttrMultiProcessorCount);
  launch_overlapping(op.head_dim == 128 ? combine_rows_kernel<T, 128> : combine_rows_kernel<T, 64>,
                     grid_of(blocks), kCombineRows * 32, spread ? 120 * 1024 : 0, stream, kernel,
                     "block_attention: splits of many rows");
}

template <typename T>
void launch_fma(const AttentionKernel& kernel, cudaStream_t stream) {
  const BlockAttention& op = kernel.op;
  const auto shared = static_cast<size_t>(attend_fma_floats(op.head_dim)) * sizeof(float);
  launch_overlapping(attend_fma_kernel<T>,
                     grid_of(int64_t{kernel.num_tiles} * op.num_heads * kernel.num_splits),
                     kFmaAttentionThreads, shared, stream, kernel, "block_attention");
}

// A GPU is full of rows long before each has a thread block.
template <typename T, int kEach>
void launch_combine(const AttentionKernel& kernel, cudaStream_t stream) {
  const int64_t rows = kernel.op.total_q * kernel.num_qo_heads.value;
  const bool few = rows <= 4 * device_attribute(cudaDevAttrMultiProcessorCount);
  dispatch_bool(few, [&](auto warp_each) {
    launch_overlapping(combine_splits_kernel<T, kEach, decltype(warp_each)::value>,
                       grid_of(few ? rows : ceil_div(rows, kStripes)), kCombineThreads, 0, stream, kernel,
                       "block_attention: splits");
  });
}

}  // namespace

int64_t block_attention_workspace(const BlockAttention& op) {
  return plan(op, nullptr).bytes;
}

void block_attention_cuda(const BlockAttention& op, void* workspace, void* stream) {
  auto* const memory = static_cast<char*>(workspace);
  const Plan plan = livevlm::plan(op, memory);
  const AttentionKernel& kernel = plan.kernel;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (plan.many) {
    AttentionKernel many = kernel;
    many.min_rows = kernel.max_rows + 1, many.max_rows = INT32_MAX;
    launch_tiles(many, memory + plan.found_bytes, cuda_stream);
  }
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (plan.few) {
      if constexpr (sizeof(T) == 2) {
        const bool floats = uses_mma(op) && op.format == PoolFormat::kFloats;
        if (floats && op.head_dim == 128) launch_mma<T, 128>(plan, cuda_stream);
        if (floats && op.head_dim == 64) launch_mma<T, 64>(plan, cuda_stream);
      }
      if (uses_mma(op) && op.format != PoolFormat::kFloats) {
        const auto launch = op.format == PoolFormat::kFp8 ? launch_fp8 : launch_int4;
        launch(kernel, plan.work, cuda_stream);
      }
      if (!uses_mma(op)) launch_fma<T>(kernel, cuda_stream);
      kernel.together == 1 ? launch_combine<T, kTogether>(kernel, cuda_stream)
                           : launch_combine<T, 1>(kernel, cuda_stream);
    }
    if constexpr (sizeof(T) == 2) {
      if (plan.many) launch_combine_rows<T>(kernel, cuda_stream);
    }
  });
}

}  // namespace livevlm
