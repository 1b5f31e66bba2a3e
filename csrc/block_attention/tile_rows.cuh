// SPDX-License-Identifier: Apache-2.0
// `block_attention` on Hopper: what a thread block of attend_tiles.cuh works on, and what a warpgroup does
// with its 64 rows between products. They lie in registers as the instructions want them: a thread has two
// rows, 16 warp + lane / 4 and 8 further, and of every eight columns 2 (lane % 4) and the next one.
#pragma once

#include "block_attention/tile_images.cuh"
#include "common/wgmma_tiles.cuh"

namespace livevlm {

inline constexpr int kWorkBytes = 64;  // of a TileWork

template <typename Element, int kHeadDim, int kTileKeys, int kWarpgroups, int kRing, bool kInTurn = true,
          bool kGather = false>
struct TileConfig {
  using T = Element;
  static constexpr int kDim = kHeadDim, kKeys = kTileKeys, kGroups = kWarpgroups, kStages = kRing;
  static constexpr bool kTurns = kInTurn;    // products of the warpgroups start in turn
  static constexpr bool kGathers = kGather;  // a warpgroup gathers the tiles: gather_tiles.cuh
  static constexpr int kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  // Registers of a thread: 65536 in all, of which a launch gives every warp as many. These are enough with
  // the smaller tiles that are gathered, but not with others.
  static constexpr int kBringing = kGroups == 2 ? 24 : 32, kAttending = kGroups == 2 ? 240 : 160;
  static_assert(128 * (kBringing + kGroups * kAttending) <= 65536, "a multiprocessor has no more");
  // Shared memory. Images are multiples of 1024 bytes.
  static constexpr int kImageBytes = kKeys * kDim * 2, kQueryBytes = 64 * kDim * 2;
  static constexpr int kPresentBytes = kPresentWords * 4;
  static constexpr int kKeysAt = kGroups * kQueryBytes, kValuesAt = kKeysAt + kStages * kImageBytes;
  static constexpr int kPresentAt = kValuesAt + kStages * kImageBytes;
  static constexpr int kLimitsAt = kPresentAt + kStages * kPresentBytes;  // Range: keys that a row sees
  static constexpr int kBarriersAt = kLimitsAt + kRows * 8;
  static constexpr int kWorkAt = kBarriersAt + 4 * kStages * 8, kAngleRowsAt = kWorkAt + kWorkBytes;
  static constexpr int kSharedBytes = kAngleRowsAt + (kGathers ? kStages * kKeys * 4 : 0);
};

#ifdef LIVEVLM_SM90A

template <typename C>
struct TileBarriers {
  uint32_t base;

  // All in shared memory, kStages each: a place has been filled, all warps are done with it.
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return base + stage * 8; }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return base + (C::kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t values_full(int stage) const {
    return base + (2 * C::kStages + stage) * 8;
  }
  __device__ __forceinline__ uint32_t values_empty(int stage) const {
    return base + (3 * C::kStages + stage) * 8;
  }

  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < C::kStages; ++stage) {
      shared_barrier_init(keys_full(stage), C::kGathers ? 128 : 1);
      shared_barrier_init(values_full(stage), C::kGathers ? 128 : 1);
      shared_barrier_init(keys_empty(stage), 4 * C::kGroups);
      shared_barrier_init(values_empty(stage), 4 * C::kGroups);
    }
    shared_barriers_ready();
  }
};

// A place in a ring of kStages, and the phase of its barriers.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};
#endif

// What a thread block does. Row tiles at the end of a sequence see most keys, so they start first.
struct TileWork {
  RowTile tile;
  int32_t head, split;
  bool has_splits;
  Range keys;                     // of the split that the tile sees
  int32_t first_tile, num_tiles;  // of keys

  __device__ __forceinline__ TileWork(const TileAttention& p, uint32_t index, int32_t tile_keys)
      : TileWork(p, p.num_items - 1 - static_cast<int32_t>(index / static_cast<uint32_t>(p.op.num_heads))) {
    head = static_cast<int32_t>(index % static_cast<uint32_t>(p.op.num_heads));
    first_tile = keys.begin / tile_keys;
    num_tiles = keys.end > keys.begin ? (keys.end + tile_keys - 1) / tile_keys - first_tile : 0;
  }

  // Without splits, rows that see no key get their zeros here.
  __device__ __forceinline__ bool exists() const {
    return tile.num_rows > 0 && (num_tiles > 0 || !has_splits);
  }

  // Keys of the split that a row of the tile sees; past the last row, those of the last.
  __device__ __forceinline__ Range seen(const AttentionKernel& p, int32_t row) const {
    const Range of_row = tile.seen(p, min(row, tile.num_rows - 1));
    return {max(of_row.begin, keys.begin), min(of_row.end, keys.end)};
  }

 private:
  // Items of a sequence: its tiles, each with all its splits. With cu_seqlens_q it owns numbers enough for as
  // many as it has tiles and splits, since tiles are few where splits are many.
  struct Item {
    Sequence sequence;
    int32_t number;  // of the sequence's

    static __device__ __forceinline__ Item find(const TileAttention& p, int32_t item) {
      if (!p.op.cu_seqlens_q) {
        const int32_t each = p.num_items / static_cast<int32_t>(p.op.batch), index = item / each;
        return {Sequence(p, index), item - index * each};
      }
      const auto first_of = [&](int32_t index) {
        const int32_t query = Sequence::start_of(p, index);
        return query * static_cast<int32_t>(p.op.group_size) / p.tile_rows + index * (1 + p.most_splits);
      };
      const int32_t index = last_at_most(p.op, item, first_of);
      return {Sequence(p, index), item - first_of(index)};
    }
  };

  __device__ __forceinline__ TileWork(const TileAttention& p, int32_t item)
      : TileWork(p, Item::find(p, item)) {}

  __device__ __forceinline__ TileWork(const TileAttention& p, const Item& item)
      : TileWork(p, item, min(item.sequence.most_splits(p), p.num_splits)) {}

  __device__ __forceinline__ TileWork(const TileAttention& p, const Item& item, int32_t splits)
      : tile(p, item.sequence, item.number / splits),
        head(0),
        split(item.number % splits),
        has_splits(item.sequence.most_splits(p) > 1),
        keys(tile.keys_of(p, split)) {}
};
static_assert(sizeof(TileWork) <= kWorkBytes, "it has a place in shared memory");

#ifdef LIVEVLM_SM90A

// Logits of keys that a row does not see become -inf. `limits`: of the thread's first row; the other is 8 on.
template <int kKeys>
__device__ __forceinline__ void hide_keys(float (&logits)[kKeys / 2], int32_t first_key, int lane,
                                          const uint32_t* present, const Range* limits) {
  const Range upper = limits[0], lower = limits[8];
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const uint32_t bits = present[n / 4] >> (n % 4 * 8 + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t key = first_key + n * 8 + lane % 4 * 2 + i;
      const bool there = bits >> i & 1;
      if (!there || key < upper.begin || key >= upper.end) logits[4 * n + i] = -INFINITY;
      if (!there || key < lower.begin || key >= lower.end) logits[4 * n + 2 + i] = -INFINITY;
    }
  }
}

// The two rows of a thread: the largest logit so far, and this thread's share of the sum of exponentials.
struct TileSums {
  float tops[2] = {kNoTop, kNoTop}, sums[2] = {0.0f, 0.0f};

  // Logits become weights relative to the new tops; `shrink` is what the sums until now are to be scaled by.
  template <int kKeys>
  __device__ __forceinline__ void take(float (&logits)[kKeys / 2], float scale, float (&shrink)[2]) {
    float most[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r][0] = logits[2 * r], most[r][1] = logits[2 * r + 1];
#pragma unroll
      for (int n = 1; n < kKeys / 8; ++n) {
        most[r][0] = fmaxf(most[r][0], logits[4 * n + 2 * r]);
        most[r][1] = fmaxf(most[r][1], logits[4 * n + 2 * r + 1]);
      }
      most[r][0] = fmaxf(most[r][0], most[r][1]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r][0] = fmaxf(most[r][0], __shfl_xor_sync(~0u, most[r][0], 1));
      most[r][0] = fmaxf(most[r][0], __shfl_xor_sync(~0u, most[r][0], 2));
      const float top = fmaxf(tops[r], most[r][0] * scale);
      shrink[r] = exp2_approx(tops[r] - top);
      tops[r] = top;
    }
    float parts[2][2] = {};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& logit = logits[4 * n + i];
        logit = exp2_approx(fmaf(logit, scale, -tops[i / 2]));
        parts[i / 2][i % 2] += logit;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sums[r] = fmaf(sums[r], shrink[r], parts[r][0] + parts[r][1]);
  }
};

// As wgmma_values takes them: the fragments of keys 16 n to 16 n + 7 and 16 n + 8 to 16 n + 15.
template <typename T, int kKeys>
__device__ __forceinline__ void to_operands(uint32_t (&weights)[kKeys / 16][4],
                                            const float (&values)[kKeys / 2]) {
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[n][i] = narrow_pair(values[8 * n + 2 * i], values[8 * n + 2 * i + 1], TypeTag<T>{});
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
  float scale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float total = rows.sums[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    scale[r] = total == 0.0f ? 0.0f : 1.0f / total;
    const int32_t number = first + lane / 4 + r * 8;
    if (number >= work.tile.num_rows) continue;
    const int64_t row = work.tile.flat_row(p, work.head, number);
    if (work.has_splits) {
      const int64_t at = found_at(p, work.tile.sequence, work.head, work.tile.first_row + number, work.split);
      float* const target = p.found_out + at * C::kDim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < C::kDim / 8; ++n)
        *reinterpret_cast<float2*>(target + n * 8) =
            make_float2(sums[4 * n + 2 * r], sums[4 * n + 2 * r + 1]);
      if (lane % 4 == 0) p.found_sums[at] = make_float2(rows.tops[r], total);
    } else if (lane % 4 == 0) {
      p.op.lse[row] = (rows.tops[r] + log2f(total)) * 0.6931471805599453f;  // -inf if there is no key
    }
  }
  if (work.has_splits) return;

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
#endif  // LIVEVLM_SM90A

}  // namespace livevlm
