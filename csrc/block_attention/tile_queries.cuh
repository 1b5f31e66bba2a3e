// SPDX-License-Identifier: Apache-2.0
// `block_attention` for many rows: queries on their way into shared memory.
#pragma once

#include "block_attention/tile_rows.cuh"

namespace livevlm {

// A warp brings 16 of the 64 rows of a group, as the image of a tile.
template <typename C>
__device__ __forceinline__ void bring_queries(const TileAttention& p, const TileWork& work, int group,
                                              int warp, int lane, unsigned char* image) {
  using T = typename C::T;
  constexpr int kPieces = C::kDim / 8;
  const BlockAttention& op = p.op;
#pragma unroll
  for (int i = 0; i < 16 * kPieces / 32; ++i) {
    const int row = warp * 16 + (i * 32 + lane) / kPieces, piece = lane % kPieces;
    const bool exists = group * 64 + row < work.tile.num_rows;
    const T* from = static_cast<const T*>(op.q.data);
    if (exists) {
      const auto number = static_cast<uint32_t>(work.tile.first_row + group * 64 + row);
      const uint32_t query = p.group_size.quotient(number);
      const int64_t head = int64_t{work.head} * p.group_size.value + (number - query * p.group_size.value);
      from += (int64_t{work.tile.sequence.first_query} + query) * op.q.stride_token +
              head * op.q.stride_head + piece * 8;
    }
    cp_async16(image + image_offset<64>(row, piece), from, exists);
  }
  cp_async_commit();
}

// Once they are there: rotates them if that is still to be done. Angles of all of a thread's pieces are asked
// for together.
template <typename C>
__device__ __forceinline__ void rotate_queries(const TileAttention& p, const TileWork& work, int group,
                                               int warp, int lane, unsigned char* image) {
  constexpr int kPieces = C::kDim / 16, kItems = 16 * kPieces / 32;
  const BlockAttention& op = p.op;
  if (!op.q_positions) {
    cp_async_wait<0>();
    return;
  }
  const int piece = lane % kPieces;
  const auto row_of = [&](int i) { return warp * 16 + (i * 32 + lane) / kPieces; };
  AnyAngles8 angles[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int row = min(group * 64 + row_of(i), work.tile.num_rows - 1);  // there is one to load
    const int64_t token = int64_t{work.tile.sequence.first_query} + work.tile.query_of(p, row);
    angles[i].load(op, angle_row(op, query_position(op, token)), piece * 8);
  }
  cp_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    auto* const low = reinterpret_cast<uint4*>(image + image_offset<64>(row_of(i), piece));
    auto* const high = reinterpret_cast<uint4*>(image + image_offset<64>(row_of(i), piece + kPieces));
    uint4 a = *low, b = *high;
    angles[i].template rotate<typename C::T>(op, a, b);
    *low = a, *high = b;
  }
}

}  // namespace livevlm
