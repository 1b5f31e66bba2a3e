// SPDX-License-Identifier: Apache-2.0
// Host side of attend_codes.cuh, whose kernels are compiled in a file for each format.
#pragma once

#include "block_attention/attend_codes.cuh"
#include "common/cuda_launch.cuh"

namespace livevlm {

void launch_fp8(const AttentionKernel& kernel, WarpWork work, cudaStream_t stream);
void launch_int4(const AttentionKernel& kernel, WarpWork work, cudaStream_t stream);

// Elements of a pool in 16 bytes, if those are floats of 16 bits or codes.
inline int64_t elements_of_piece(const BlockAttention& op) {
  return op.format == PoolFormat::kFloats ? 8 : 16;
}

// Whether keys and values can be read in pieces of 16 bytes, and pairs.
inline bool pools_vectorised(const BlockAttention& op) {
  const int64_t bytes = 16 / elements_of_piece(op);
  const int64_t row = op.format == PoolFormat::kInt4 ? op.head_dim / 2 : op.head_dim;
  if (op.format == PoolFormat::kInt4 &&
      (!aligned16(op.k_scale) || reinterpret_cast<uintptr_t>(op.v_scale) % 4 != 0))
    return false;
  return vectorised(op.k, row, bytes) && vectorised(op.v, row, bytes);
}

// Three thread blocks of a multiprocessor if registers allow it, with as many steps on their way as shared
// memory has room for.
template <int kDim, typename Format, typename Angle, WarpWork kWork>
struct CodeRingOf {
  static constexpr bool kInt4 = Format::kBits == 4;
  static constexpr int kBlocks = kWork == WarpWork::kPart ? 1 : kInt4 && Angle::kBytes > 0 ? 2 : 3;
  static constexpr int kLess = kBlocks < 3 ? 0 : kWork == WarpWork::kSplit ? 1 : 2;
  using type = CodeRing<kDim, Format, 4 + kInt4 - kLess, kBlocks>;
};

template <int kDim, typename Format, typename Angle, WarpWork kWork>
void launch_codes(const AttentionKernel& kernel, cudaStream_t stream) {
  using Ring = typename CodeRingOf<kDim, Format, Angle, kWork>::type;
  constexpr int kWarps = kFewWarps<kWork>, kItems = kWork == WarpWork::kPart ? 1 : kWarps;
  const int64_t items = int64_t{kernel.num_tiles} * kernel.op.num_heads * kernel.num_found.value;
  launch_overlapping(attend_codes_kernel<kDim, Angle, kWork, Ring>, grid_of(ceil_div(items, kItems)),
                     32 * kWarps, kWarps * kFewWarpBytes<kDim, kWork, Ring>, stream, kernel,
                     "block_attention");
}

template <int kDim, typename Format, typename Angle>
void launch_codes(const AttentionKernel& kernel, WarpWork work, cudaStream_t stream) {
  switch (work) {
    case WarpWork::kPart:
      return launch_codes<kDim, Format, Angle, WarpWork::kPart>(kernel, stream);
    case WarpWork::kSplit:
      return launch_codes<kDim, Format, Angle, WarpWork::kSplit>(kernel, stream);
    case WarpWork::kSplits:
      return launch_codes<kDim, Format, Angle, WarpWork::kSplits>(kernel, stream);
  }
}

template <int kDim, typename Format>
void launch_codes(const AttentionKernel& kernel, WarpWork work, cudaStream_t stream) {
  if (!kernel.op.cos_sin_cache) return launch_codes<kDim, Format, NoAngles>(kernel, work, stream);
  if (kernel.op.cos_sin_half) return launch_codes<kDim, Format, HalfAngles>(kernel, work, stream);
  launch_codes<kDim, Format, FloatAngles>(kernel, work, stream);
}

template <typename Format>
void launch_format(const AttentionKernel& kernel, WarpWork work, cudaStream_t stream) {
  kernel.op.head_dim == 128 ? launch_codes<128, Format>(kernel, work, stream)
                            : launch_codes<64, Format>(kernel, work, stream);
}

}  // namespace livevlm
