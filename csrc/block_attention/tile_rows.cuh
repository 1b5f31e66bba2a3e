// SPDX-License-Identifier: Apache-2.0
// `block_attention` for many rows: what a thread block of attend_tiles.cuh or attend_tiles_mma.cuh works on,
// and what a warp does with its 16 rows between products. They lie in registers as the instructions of either
// want them: a thread has the rows lane / 4 and 8 further, and of every eight columns 2 (lane % 4) and the
// next one.
#pragma once

#include "block_attention/angles.cuh"
#include "block_attention/tile_images.cuh"
#include "common/wgmma_tiles.cuh"

namespace livevlm {

inline constexpr int kWorkBytes = 64;  // of a TileWork

template <typename Element, int kHeadDim, int kTileKeys, int kWarpgroups, int kRing, bool kInTurn = true,
          bool kGather = false, typename AngleType = NoAngles>
struct TileConfig {
  using Angle = AngleType;  // of keys that are rotated here
  using T = Element;
  static constexpr int kDim = kHeadDim, kKeys = kTileKeys, kGroups = kWarpgroups, kStages = kRing;
  static constexpr bool kTurns = kInTurn;    // products of the warpgroups start in turn
  static constexpr bool kGathers = kGather;  // from the pool: gather_tiles.cuh
  static constexpr bool kUsesWarpgroups = true;
  static constexpr int kBringers = kGathers ? 2 : 1;  // warpgroups; without gathering, one thread of it
  static constexpr int kRows = 64 * kGroups, kThreads = 128 * (kGroups + kBringers);
  // Registers of a thread: 65536 in all, of which a launch gives every warp as many, and too few.
  static constexpr int kBringing = kGathers ? 96 : kGroups == 2 ? 24 : 32;
  static constexpr int kAttending = !kGathers && kGroups == 2 ? 240 : 160;
  static_assert(128 * (kBringers * kBringing + kGroups * kAttending) <= 65536,
                "a multiprocessor has no more");
  // Shared memory. Images are multiples of 1024 bytes.
  static constexpr int kImageBytes = kKeys * kDim * 2, kQueryBytes = 64 * kDim * 2;
  static constexpr int kPresentBytes = kGathers ? kKeys / 8 : kPresentWords * 4;
  static constexpr int kKeysAt = kGroups * kQueryBytes, kValuesAt = kKeysAt + kStages * kImageBytes;
  static constexpr int kAngleBytes = Angle::kBytes * kDim;  // of a key; of two tiles
  static constexpr int kAnglesAt = kValuesAt + kStages * kImageBytes;
  static constexpr int kPresentAt = kAnglesAt + 2 * kKeys * kAngleBytes;
  static constexpr int kLimitsAt = kPresentAt + kStages * kPresentBytes;  // Range: keys that a row sees
  static constexpr int kBarriersAt = kLimitsAt + kRows * 8;
  static constexpr int kBarriers = 5 * kStages + 2 * 4 * kBringers;
  static constexpr int kWorkAt = kBarriersAt + kBarriers * 8, kAngleRowsAt = kWorkAt + kGroups * kWorkBytes;
  static constexpr int kSharedBytes = kAngleRowsAt + (kAngleBytes ? kStages * kKeys * 4 : 0);
};

#ifdef LIVEVLM_SM90A

template <typename C>
struct TileBarriers {
  uint32_t base;

  // All in shared memory, kStages each: a place has been filled, all warps are done with it; there are keys
  // to be rotated.
  __device__ __forceinline__ uint32_t keys_full(int stage) const { return base + stage * 8; }
  __device__ __forceinline__ uint32_t keys_empty(int stage) const { return base + (C::kStages + stage) * 8; }
  __device__ __forceinline__ uint32_t values_full(int stage) const {
    return base + (2 * C::kStages + stage) * 8;
  }
  __device__ __forceinline__ uint32_t values_empty(int stage) const {
    return base + (3 * C::kStages + stage) * 8;
  }

  __device__ __forceinline__ uint32_t keys_copied(int stage) const {
    return base + (4 * C::kStages + stage) * 8;
  }
  // Of a warp, for every other tile.
  __device__ __forceinline__ uint32_t angles_full(int tile, int warp) const {
    return base + (5 * C::kStages + tile % 2 * 4 * C::kBringers + warp) * 8;
  }

  // By all warps of the block.
  __device__ __forceinline__ void init() const {
    constexpr int kThreads = 128 * C::kBringers, kWarps = 4 * C::kBringers;  // that gather
    const auto arrivals = [](int barrier) {
      const int kind = barrier / C::kStages;
      if (kind == 1 || kind == 3) return 4 * C::kGroups;
      if (!C::kGathers || kind > 4) return 1;
      // A warp rotates keys, or the copies of each thread arrive; a warp also says which of its keys are
      // there.
      return kind == 0 ? (C::kAngleBytes ? kWarps : kThreads) + kWarps : kThreads;
    };
    if (threadIdx.x % 32 == 0) {
      for (auto i = static_cast<int>(threadIdx.x / 32); i < C::kBarriers; i += C::kThreads / 32)
        shared_barrier_init(base + i * 8, arrivals(i));
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
  int32_t head, split, num_splits;
  bool has_splits;
  Range keys;                     // of the split that the tile sees
  int32_t first_tile, num_tiles;  // of keys

  // `seq_lens` is loaded here, but only num_tiles and `keys` follow from it.
  __device__ __forceinline__ TileWork(const TileAttention& p, uint32_t index, int32_t tile_keys)
      : TileWork(p, p.num_items - 1 - static_cast<int32_t>(p.num_heads.quotient(index))) {
    head = static_cast<int32_t>(index - p.num_heads.quotient(index) * p.num_heads.value);
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
  // many as it has tiles and splits, since tiles are few where splits are more than even_splits.
  struct Item {
    Sequence sequence;
    int32_t number;  // of the sequence's

    static __device__ __forceinline__ Item find(const TileAttention& p, int32_t item) {
      if (!p.op.cu_seqlens_q) {
        const auto index = static_cast<int32_t>(p.items_each.quotient(static_cast<uint32_t>(item)));
        return {Sequence(p, index), item - index * static_cast<int32_t>(p.items_each.value)};
      }
      const auto first_of = [&](int32_t index) {
        const int32_t query = Sequence::start_of(p, index);
        return query * static_cast<int32_t>(p.op.group_size) / p.tile_rows * p.even_splits +
               index * (p.even_splits + p.tile_splits);
      };
      const int32_t index = last_at_most(p.op, item, first_of);
      return {Sequence(p, index), item - first_of(index)};
    }
  };

  __device__ __forceinline__ TileWork(const TileAttention& p, int32_t item)
      : TileWork(p, Item::find(p, item)) {}

  __device__ __forceinline__ TileWork(const TileAttention& p, const Item& item)
      : TileWork(p, item, item.sequence.most_splits(p)) {}

  __device__ __forceinline__ TileWork(const TileAttention& p, const Item& item, int32_t most_splits)
      : TileWork(p, item, most_splits, min(most_splits, p.num_splits)) {}

  __device__ __forceinline__ TileWork(const TileAttention& p, const Item& item, int32_t most_splits,
                                      int32_t num_splits)
      : TileWork(p, item,
                 p.op.cu_seqlens_q || p.even_splits > 1  // then splits follow from lengths, too
                     ? item.number / num_splits
                     : static_cast<int32_t>(p.splits_each.quotient(static_cast<uint32_t>(item.number))),
                 most_splits, num_splits) {}

  __device__ __forceinline__ TileWork(const TileAttention& p, const Item& item, int32_t number,
                                      int32_t most_splits, int32_t num_splits)
      : tile(p, item.sequence, number),
        head(0),
        split(item.number - number * num_splits),
        num_splits(num_splits),
        has_splits(most_splits > 1),
        keys(tile.keys_of(p, split)) {}
};
static_assert(sizeof(TileWork) == kWorkBytes, "it has a place in shared memory");

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

}  // namespace livevlm
