// SPDX-License-Identifier: Apache-2.0
// Host side of the kernels of `block_attention` for many rows.
#pragma once

#include <cstdlib>
#include <string_view>

#include "block_attention/attend_codes_launch.cuh"
#include "block_attention/attend_tiles.cuh"
#include "block_attention/attend_tiles_mma.cuh"
#include "common/cuda_launch.cuh"

namespace livevlm {

// Tiles as they were fastest: bench/results.
template <typename T, int kDim>
struct BestTiles;
template <typename T>
struct BestTiles<T, 128> : TypeTag<TileConfig<T, 128, 128, 2, 2>> {};
template <typename T>
struct BestTiles<T, 64> : TypeTag<TileConfig<T, 64, 128, 2, 3>> {};

// Those that a block gathers itself: as many as there is room for, beside queries and angles of two.
template <int kDim, typename Angle>
inline constexpr int kGatheredAtOnce =
    std::min(8, (227 * 1024 - 2 * 64 * kDim * (2 + Angle::kBytes) - 3072) / (64 * kDim * 2 * 2));
template <typename T, int kDim, typename Angle>
using GatheredTiles = TileConfig<T, kDim, 64, 2, kGatheredAtOnce<kDim, Angle>, false, true, Angle>;

// LIVEVLM_ATTENTION=mma in the environment turns warpgroup products off, so that tests on Hopper reach the
// kernel of other GPUs.
inline bool uses_warpgroups() {
  static const bool allowed = [] {
    const char* wanted = std::getenv("LIVEVLM_ATTENTION");
    return !(wanted && std::string_view(wanted) == "mma");
  }();
  return allowed && has_warpgroup_products();
}

// Calls body(TypeTag<a configuration>{}).
template <typename Body>
void dispatch_tiles(const BlockAttention& op, Body body) {
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto with_dim = [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      if (uses_warpgroups()) return body(TypeTag<typename BestTiles<T, kDim>::type>{});
      body(TypeTag<MmaTiles<T, kDim, 2, 1, false>>{});
    };
    if constexpr (sizeof(T) == 2) op.head_dim == 128 ? with_dim(IntTag<128>{}) : with_dim(IntTag<64>{});
  });
}

template <typename Body>
void dispatch_gathered(const BlockAttention& op, Body body) {
  dispatch_float(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto with_angles = [&](auto angle) {
      using Angle = typename decltype(angle)::type;
      if (op.head_dim == 128) return body(TypeTag<GatheredTiles<T, 128, Angle>>{});
      body(TypeTag<GatheredTiles<T, 64, Angle>>{});
    };
    if constexpr (sizeof(T) == 2) {
      if (!uses_warpgroups()) {
        if (op.head_dim == 128) return body(TypeTag<MmaTiles<T, 128, 1, 2, true>>{});
        return body(TypeTag<MmaTiles<T, 64, 1, 2, true>>{});
      }
      if (!op.cos_sin_cache) return with_angles(TypeTag<NoAngles>{});
      if (op.cos_sin_half) return with_angles(TypeTag<HalfAngles>{});
      with_angles(TypeTag<FloatAngles>{});
    }
  });
}

// Blocks of sequences with at most so many rows gather tiles, as they would not repay images; others share
// these. So the choice follows from the sequence alone.
inline constexpr int32_t kGatheredRows = 4 * kManyRows;

// Whether a sequence may have more. Of quantised pools all need images: codes are widened once.
inline bool may_need_images(const AttentionKernel& kernel) {
  const BlockAttention& op = kernel.op;
  if (op.format != PoolFormat::kFloats) return true;
  return (op.cu_seqlens_q ? op.total_q : op.total_q / op.batch) * op.group_size > kGatheredRows;
}

inline bool tiles_fit(const BlockAttention& op) {
  return op.dtype != DType::kFloat32 && (op.head_dim == 64 || op.head_dim == 128) &&
         vectorised(op.q, op.head_dim, 2) && pools_vectorised(op) && aligned16(op.out) &&
         (!op.cos_sin_cache || aligned16(op.cos_sin_cache));
}

template <typename C>
int64_t max_tiles(const BlockAttention& op) {
  return ceil_div(op.max_blocks * op.block_size, C::kKeys);
}

// Images, then bits. How long sequences are is not known here, only what their tables have room for.
template <typename C>
int64_t tiles_bytes(const BlockAttention& op) {
  return op.batch * op.num_heads * max_tiles<C>(op) * (2 * C::kImageBytes + C::kPresentBytes);
}

inline int64_t tiles_workspace(const AttentionKernel& kernel) {
  int64_t bytes = 0;
  if (!may_need_images(kernel)) return bytes;
  dispatch_tiles(kernel.op,
                 [&](auto config) { bytes = tiles_bytes<typename decltype(config)::type>(kernel.op); });
  return bytes;
}

template <typename C>
TileAttention tile_attention(AttentionKernel kernel, void* workspace) {
  const BlockAttention& op = kernel.op;
  kernel.tile_rows = C::kRows;
  auto* const images = static_cast<unsigned char*>(workspace);
  const int64_t tiles = op.batch * op.num_heads * max_tiles<C>(op);
  auto* const present = reinterpret_cast<uint32_t*>(images + tiles * (2 * C::kImageBytes));
  int64_t items = op.total_q * op.group_size / C::kRows * kernel.even_splits +
                  op.batch * (kernel.even_splits + kernel.tile_splits);
  int64_t splits = 1;
  if (!op.cu_seqlens_q) {
    const int64_t rows = op.total_q / op.batch * op.group_size;
    splits = std::min<int64_t>(splits_of_rows(kernel, rows), kernel.num_splits);
    items = op.batch * ceil_div(rows, C::kRows) * splits;
  }
  return {kernel,
          images,
          present,
          static_cast<int32_t>(max_tiles<C>(op)),
          static_cast<int32_t>(items),
          Divisor(std::max<int64_t>(items / op.batch, 1)),
          Divisor(splits)};
}

template <typename C>
void launch_tile_images(const TileAttention& tiles, cudaStream_t stream) {
  using T = typename C::T;
  launch_kernel(tiles.op.format == PoolFormat::kFloats ? tile_images_kernel<T, C::kDim, C::kKeys>
                                                       : tile_images_kernel<T, C::kDim, C::kKeys, true>,
                grid_of(tiles.op.batch * tiles.op.num_heads * tiles.max_tiles), kImageThreads, 0, stream,
                tiles, "block_attention: tiles of keys");
}

template <typename C>
void launch_attend_tiles(const TileAttention& tiles, cudaStream_t stream) {
  const int64_t blocks = int64_t{tiles.num_items} * tiles.op.num_heads;
  constexpr auto launch = C::kGathers ? launch_overlapping<TileAttention> : launch_kernel<TileAttention>;
  const auto start = [&](void (*kernel)(TileAttention)) {
    launch(kernel, grid_of(blocks), C::kThreads, C::kSharedBytes, stream, tiles, "block_attention: tiles");
  };
  if constexpr (C::kUsesWarpgroups) {
    start(attend_tiles_kernel<C>);
  } else {
    start(attend_tiles_mma_kernel<C>);
  }
}

// `workspace`: tiles_workspace() bytes, aligned to 16. Rows of a sequence without splits get their final
// result, others what combine_splits_kernel needs; rows outside of all sequences get none.
inline void launch_tiles(AttentionKernel kernel, void* workspace, cudaStream_t stream) {
  const int32_t fewest = kernel.min_rows;
  const int32_t gathered = kernel.op.format == PoolFormat::kFloats ? kGatheredRows : fewest - 1;
  if (may_need_images(kernel)) {
    kernel.min_rows = std::max(fewest, gathered + 1);
    dispatch_tiles(kernel.op, [&](auto config) {
      using C = typename decltype(config)::type;
      const TileAttention tiles = tile_attention<C>(kernel, workspace);
      launch_tile_images<C>(tiles, stream);
      launch_attend_tiles<C>(tiles, stream);
    });
    if (!kernel.op.cu_seqlens_q) return;
  }
  if (gathered < fewest) return;
  kernel.min_rows = fewest, kernel.max_rows = gathered;
  // Where all of them have so many splits, these do not follow from lengths: no division by what is loaded.
  if (splits_of_rows(kernel, gathered) > kernel.even_splits) kernel.even_splits = 1;
  dispatch_gathered(kernel.op, [&](auto config) {
    using C = typename decltype(config)::type;
    launch_attend_tiles<C>(tile_attention<C>(kernel, nullptr), stream);
  });
}

}  // namespace livevlm
