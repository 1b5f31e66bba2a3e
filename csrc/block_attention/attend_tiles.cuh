// SPDX-License-Identifier: Apache-2.0
// `block_attention` on Hopper, second step: rows of queries times tiles of keys (tile_images.cuh).
//
// A thread block has one row tile of a KV head, or one split of the keys that it sees. One thread brings
// tiles into shared memory, a ring of kStages for keys and another for values. The other warpgroups have 64
// rows each: logits by a product of queries and keys from shared memory, their exponentials in registers,
// which are the left operand of the product with the values. While a warpgroup takes the exponentials of a
// tile, its product with the values of the tile before runs, and the products of the other warpgroups, which
// start them in turn. Tiles begin at multiples of kKeys whatever the row, and one that a row does not see
// changes none of its bits: so its result does not depend on the rows that it shares a tile with.
#pragma once

#include "block_attention/gather_tiles.cuh"
#include "block_attention/tile_queries.cuh"
#include "block_attention/tile_results.cuh"

namespace livevlm {

#ifdef LIVEVLM_SM90A

// By one thread. Keys of a tile come before the values of the one before it: they are needed in this order.
template <typename C>
__device__ __forceinline__ void bring_tiles(const TileAttention& p, const TileWork& work, uint32_t memory) {
  const TileBarriers<C> barriers{memory + C::kBarriersAt};
  const int64_t index = p.tile_index(work.tile.sequence.index, work.head, work.first_tile);
  const unsigned char* image = p.images + index * (2 * C::kImageBytes);
  const uint32_t* present = p.present + index * kPresentWords;
  const int32_t num_tiles = work.num_tiles;
  RingPlace<C::kStages> keys, values;
  for (int32_t i = 0; i <= num_tiles; ++i) {
    if (i < num_tiles) {
      shared_barrier_wait(barriers.keys_empty(keys.stage), keys.phase ^ 1);
      const uint32_t full = barriers.keys_full(keys.stage);
      shared_barrier_expect(full, C::kImageBytes + C::kPresentBytes);
      copy_to_shared(memory + C::kKeysAt + keys.stage * C::kImageBytes, image, C::kImageBytes, full);
      copy_to_shared(memory + C::kPresentAt + keys.stage * C::kPresentBytes, present, C::kPresentBytes, full);
      keys.next();
    }
    if (i > 0) {
      shared_barrier_wait(barriers.values_empty(values.stage), values.phase ^ 1);
      const uint32_t full = barriers.values_full(values.stage);
      shared_barrier_expect(full, C::kImageBytes);
      copy_to_shared(memory + C::kValuesAt + values.stage * C::kImageBytes, image - C::kImageBytes,
                     C::kImageBytes, full);
      values.next();
    }
    image += 2 * C::kImageBytes;
    present += kPresentWords;
  }
}

template <typename C>
__device__ __forceinline__ void start_logits(float (&logits)[C::kKeys / 2], uint32_t queries, uint32_t keys) {
  const uint64_t a = wgmma_descriptor(queries), b = wgmma_descriptor(keys);
  wgmma_arrive();
#pragma unroll
  for (int step = 0; step < C::kDim / 16; ++step) {  // addresses count in 16 bytes
    wgmma_logits<typename C::T, C::kKeys>(logits, a + step / 4 * (64 * 128 / 16) + step % 4 * 2,
                                          b + step / 4 * (C::kKeys * 128 / 16) + step % 4 * 2, step > 0);
  }
  wgmma_commit();
}

template <typename C>
__device__ __forceinline__ void start_values(float (&sums)[C::kDim / 2],
                                             const uint32_t (&weights)[C::kKeys / 16][4], uint32_t values) {
  const uint64_t b = transposed_descriptor(values, C::kKeys * 128);
  wgmma_arrive();
#pragma unroll
  for (int step = 0; step < C::kKeys / 16; ++step)
    wgmma_values<typename C::T, C::kDim>(sums, weights[step], b + step * (16 * 128 / 16));
  wgmma_commit();
}

// A warpgroup: its 64 rows times all tiles.
template <typename C>
__device__ __forceinline__ void attend_rows(const TileAttention& p, const TileWork& work,
                                            const TileBarriers<C>& barriers, unsigned char* memory, int group,
                                            int warp, int lane) {
  const uint32_t base = shared_address(memory), queries = base + group * C::kQueryBytes;
  unsigned char* const own = memory + group * C::kQueryBytes;
  const int own_barrier = 1 + C::kGroups + group;
  Range* const limits = reinterpret_cast<Range*>(memory + C::kLimitsAt) + group * 64;
  rotate_queries<C>(p, work, group, warp, lane, own);
  if (warp < 2) limits[warp * 32 + lane] = work.seen(p, group * 64 + warp * 32 + lane);
  // Tiles within these are seen by all rows of the warpgroup.
  const int32_t all_from = work.seen(p, group * 64 + 63).begin, all_to = work.seen(p, group * 64).end;
  wgmma_fence_shared();
  named_barrier_wait(own_barrier, 128);
  if (C::kTurns && group == C::kGroups - 1) named_barrier_arrive(1, 256);  // the first warpgroup starts

  TileSums rows;
  float logits[C::kKeys / 2], sums[C::kDim / 2] = {}, shrink[2];
  uint32_t weights[C::kKeys / 16][4];
  RingPlace<C::kStages> keys, values;
  int32_t first_key = work.first_tile * C::kKeys;
  const int32_t num_tiles = work.num_tiles;

  const auto present_of = [&](int stage) {
    return reinterpret_cast<const uint32_t*>(memory + C::kPresentAt + stage * C::kPresentBytes);
  };
  // Waits for the keys of a tile; tells whether some row is not to see all of them.
  const auto keys_masked = [&] {
    shared_barrier_wait(barriers.keys_full(keys.stage), keys.phase);
    if (C::kGathers) wgmma_fence_shared();  // see values_there
    const uint32_t* const present = present_of(keys.stage);
    // One lane reads: it is the one that lets the copy engine write there again.
    const bool hidden = C::kGathers ? (present[0] & present[1]) != ~0u
                                    : __any_sync(~0u, (lane == 0 ? present[kSomeHidden] : 0u) != 0);
    return hidden || first_key < all_from || first_key + C::kKeys > all_to;
  };
  // Once the logits are there: hides keys, lets the copy engine have their place, takes the exponentials.
  const auto take = [&](bool masked) {
    wgmma_landed(logits);
    if (masked) {
      hide_keys<C::kKeys>(logits, first_key, lane, present_of(keys.stage), limits + warp * 16 + lane / 4);
      __syncwarp();
    }
    if (lane == 0) shared_barrier_arrive(barriers.keys_empty(keys.stage));
    keys.next();
    first_key += C::kKeys;
    rows.take<C::kKeys>(logits, p.scale, shrink);
  };
  const auto values_there = [&] {
    shared_barrier_wait(barriers.values_full(values.stage), values.phase);
    if (C::kGathers) wgmma_fence_shared();  // none by those who copied them: they did not wait for them
  };
  const auto release_values = [&] {
    wgmma_landed(sums);
    if (lane == 0) shared_barrier_arrive(barriers.values_empty(values.stage));
    values.next();
  };

  if (num_tiles > 0) {
    const bool masked = keys_masked();
    start_logits<C>(logits, queries, base + C::kKeysAt);
    wgmma_wait<0>();
    take(masked);
    to_operands<typename C::T, C::kKeys>(weights, logits);
  }
  for (int32_t i = 1; i < num_tiles; ++i) {
    const bool masked = keys_masked();
    if (C::kTurns) named_barrier_wait(1 + group, 256);
    start_logits<C>(logits, queries, base + C::kKeysAt + keys.stage * C::kImageBytes);
    values_there();
    start_values<C>(sums, weights, base + C::kValuesAt + values.stage * C::kImageBytes);
    if (C::kTurns) named_barrier_arrive(1 + (group + 1) % C::kGroups, 256);
    wgmma_wait<1>();
    take(masked);
    compute_before_wait(fminf(rows.sums[0], rows.sums[1]));
    wgmma_wait<0>();
    release_values();
#pragma unroll
    for (int j = 0; j < C::kDim / 2; ++j) sums[j] *= shrink[j / 2 % 2];
    wgmma_landed(logits);  // not before: the weights until now were in use
    to_operands<typename C::T, C::kKeys>(weights, logits);
  }
  if (num_tiles > 0) {
    values_there();
    start_values<C>(sums, weights, base + C::kValuesAt + values.stage * C::kImageBytes);
    wgmma_wait<0>();
    wgmma_landed(sums);
  }
  named_barrier_wait(own_barrier, 128);  // all of the warpgroup are done with the queries
  store_rows<C>(p, work, rows, sums, own, group, warp, lane);
}

// What leads to the first key, its place in the table and how many keys there are, comes from memory at the
// same time, and before kernels ahead have ended: they may still write it, but not what is in the L2 cache of
// it behind its back. With cu_seqlens_q it takes too long to find out whose block this is.
__device__ __forceinline__ void prefetch_table(const TileAttention& p) {
  const BlockAttention& op = p.op;
  if (op.cu_seqlens_q) return;
  const uint32_t item_from_end = p.num_heads.quotient(blockIdx.x);
  const uint32_t head = blockIdx.x - item_from_end * p.num_heads.value;
  const uint32_t sequence = p.items_each.quotient(static_cast<uint32_t>(p.num_items) - 1 - item_from_end);
  const auto entry = static_cast<int32_t>(threadIdx.x) * 32;
  if (threadIdx.x == 0) prefetch_l2(op.seq_lens + sequence);
  if (entry < op.max_blocks) prefetch_l2(table_of(op, static_cast<int32_t>(sequence), head) + entry);
}
#endif

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attend_tiles_kernel([[maybe_unused]] const __grid_constant__ TileAttention p) {
#ifdef LIVEVLM_SM90A
  LIVEVLM_TILE_MEMORY(memory);
  const uint32_t base = shared_address(memory);
  const TileBarriers<C> barriers{base + C::kBarriersAt};
  if constexpr (C::kGathers) prefetch_table(p);
  barriers.init();
  __syncthreads();
  if constexpr (C::kGathers) {
    wait_for_previous_kernels();
    let_next_kernel_start();  // not before: see combine_rows_kernel
  }
  // Through a shuffle, so that the compiler knows that a warp does not diverge over it.
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int group = __shfl_sync(~0u, thread / 128, 0), warp = __shfl_sync(~0u, thread / 32 % 4, 0);
  const TileWork found(p, blockIdx.x, C::kKeys);
  if (group >= C::kGroups) {
    if (!found.exists()) return;
    shrink_registers<C::kBringing>();
    if constexpr (C::kGathers)
      TileGather<C>(p, found, barriers, memory, (group - C::kGroups) * 4 + warp, lane);
    else if (thread == 128 * C::kGroups)
      bring_tiles<C>(p, found, base);
  } else {
    // Before it is known how many keys there are, and so before these take up all that memory can give.
    bring_queries<C>(p, found, group, warp, lane, memory + group * C::kQueryBytes);
    if (!found.exists()) return;
    // In shared memory: there are no registers for it while products run.
    TileWork& work = reinterpret_cast<TileWork*>(memory + C::kWorkAt)[group];
    if (warp == 0 && lane == 0) work = found;
    named_barrier_wait(1 + C::kGroups + group, 128);
    grow_registers<C::kAttending>();
    attend_rows<C>(p, work, barriers, memory, group, warp, lane);
  }
#endif
}

}  // namespace livevlm
