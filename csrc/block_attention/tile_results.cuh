// SPDX-License-Identifier: Apache-2.0
// `block_attention` for many rows: what a warp writes once its 16 rows are through.
#pragma once

#include "block_attention/tile_rows.cuh"

namespace livevlm {

// What splits found, for combine_rows.cuh: a warp's 16 rows, half of their dimensions at a time through
// shared memory, so that it writes whole lines. A warp reads only what it wrote.
template <typename C>
__device__ __forceinline__ void store_found(const TileAttention& p, const TileWork& work,
                                            const TileSums& rows, const float (&totals)[2],
                                            const float (&sums)[C::kDim / 2], unsigned char* own, int first,
                                            int warp, int lane) {
  constexpr int kPieces = C::kDim / 8, kAtOnce = 32 / kPieces;  // of 16 bytes, of half a row; rows
  unsigned char* const staged = own + warp * 16 * (kPieces * 16);
  const auto place = [&](int row, int piece) {  // neighbouring rows in different banks
    return staged + (row * kPieces + (piece ^ 2 * row % kPieces)) * 16;
  };
  const int64_t stride = int64_t{p.op.num_heads} * work.num_splits;
  const int64_t at = found_at(p, work.tile.sequence, work.head, work.tile.first_row + first, work.split);
  const int count = min(work.tile.num_rows - first, 16);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + r * 8;
    if (lane % 4 == 0 && row < count) p.found_sums[at + row * stride] = make_float2(rows.tops[r], totals[r]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < kPieces / 2; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 4 * (half * (kPieces / 2) + n) + 2 * r;
        *reinterpret_cast<float2*>(place(lane / 4 + r * 8, 2 * n + lane % 4 / 2) + lane % 2 * 8) =
            make_float2(sums[i], sums[i + 1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 / kAtOnce; ++i) {
      const int row = i * kAtOnce + lane / kPieces, piece = lane % kPieces;
      const float4 four = *reinterpret_cast<const float4*>(place(row, piece));
      if (row < count)
        reinterpret_cast<float4*>(p.found_out + (at + row * stride) * C::kDim)[half * kPieces + piece] = four;
    }
    __syncwarp();
  }
}

// What is known of the rows once all tiles are through; `own` is memory for 64 rows of 16-bit floats.
template <typename C>
__device__ __forceinline__ void store_rows(const TileAttention& p, const TileWork& work, const TileSums& rows,
                                           const float (&sums)[C::kDim / 2], unsigned char* own, int group,
                                           int warp, int lane) {
  using T = typename C::T;
  constexpr int kPieces = C::kDim / 8;  // of 16 bytes, of a row
  const int32_t first = group * 64 + warp * 16;
  float scale[2], totals[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = rows.sums[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    scale[r] = total == 0.0f ? 0.0f : 1.0f / total;
    totals[r] = total;
    const int32_t number = first + lane / 4 + r * 8;
    if (work.has_splits || number >= work.tile.num_rows || lane % 4 != 0) continue;
    const int64_t row = work.tile.flat_row(p, work.head, number);
    p.op.lse[row] = (rows.tops[r] + log2f(total)) * 0.6931471805599453f;  // -inf if there is no key
  }
  if (work.has_splits) {
    store_found<C>(p, work, rows, totals, sums, own, first, warp, lane);
    return;
  }

  // Through shared memory, swizzled as ever, to write 16 bytes at a time. A warp reads only what it wrote.
  unsigned char* const staged = own + warp * 16 * (kPieces * 16);
#pragma unroll
  for (int n = 0; n < kPieces; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane / 4 + r * 8;
      *reinterpret_cast<uint32_t*>(staged + (row * kPieces + (n ^ row % 8)) * 16 + lane % 4 * 4) =
          narrow_pair(sums[4 * n + 2 * r] * scale[r], sums[4 * n + 2 * r + 1] * scale[r], TypeTag<T>{});
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * kPieces / 32; ++i) {
    const int row = (i * 32 + lane) / kPieces, piece = lane % kPieces;
    if (first + row >= work.tile.num_rows) continue;
    const int64_t to = work.tile.flat_row(p, work.head, first + row);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.op.out) + to * C::kDim + piece * 8) =
        *reinterpret_cast<const uint4*>(staged + (row * kPieces + (piece ^ row % 8)) * 16);
  }
}

}  // namespace livevlm
