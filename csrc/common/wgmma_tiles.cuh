// SPDX-License-Identifier: Apache-2.0
// Hopper's products of an attention tile, the copy of a whole tile into shared memory, and registers that
// change hands between warpgroups. Further shapes than wgmma.cuh has, with accumulators of exactly their
// size.
//
// All operands in shared memory are panels of 64 elements: rows of 128 bytes whose 16-byte piece i lies at
// i ^ row % 8, in panels that are 1024-byte aligned (the 128-byte swizzle). The same panels serve as
// - K-major operand: a row is a row of A or a column of B, and the products sum along it. Eight rows, 1024
//   bytes, are the unit that repeats (stride offset); 16 elements further are 32 bytes further, as the
//   swizzle is a function of the address; the leading offset means nothing.
// - MN-major operand B (trans-b = 1): a row is one of the summed elements, here a key, and its 64 elements
// are
//   64 columns of B. In units of 16 bytes the canonical layout is ((8, n), (8, k)) : ((1, LBO), (8, SBO)):
//   8 pieces and 8 rows are the unit, the next 64 columns (the next panel) lie LBO bytes on, the next 8
//   summed rows SBO = 1024. An instruction sums 16 rows, so the next one starts 2048 bytes on.
#pragma once

#include <type_traits>

#include "common/wgmma.cuh"

#ifdef LIVEVLM_SM90A

// Dynamic shared memory, aligned as the swizzle needs it.
#define LIVEVLM_TILE_MEMORY(name)                                        \
  extern __shared__ __align__(1024) unsigned char livevlm_tile_memory[]; \
  unsigned char* const name = livevlm_tile_memory

namespace livevlm {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// See above: the MN-major operand. `panel_bytes` from one panel to the next.
__device__ __forceinline__ uint64_t transposed_descriptor(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | static_cast<uint64_t>(panel_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// After barriers were initialised, before others (the copy engine among them) use them.
__device__ __forceinline__ void shared_barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and makes the barrier wait for so many bytes of copy_to_shared too.
__device__ __forceinline__ void shared_barrier_expect(uint32_t address, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
}

// Copies a multiple of 16 bytes in the background; `barrier` hears of their arrival.
__device__ __forceinline__ void copy_to_shared(uint32_t target, const void* source, uint32_t bytes,
                                               uint32_t barrier) {
  const auto global = static_cast<uint64_t>(__cvta_generic_to_global(source));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// By all threads of a warpgroup: gives registers of each thread back, and gets some of those, waiting for
// them if need be. Multiples of 8.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// What `value`, not negative, is computed from is computed before products that run are waited for. The
// assembler would move it behind the wait, as both are in one piece of code without branches; so here is one.
__device__ __forceinline__ void compute_before_wait(float value) {
  if (value < 0.0f) __nanosleep(1);
}

// clang-format off
#define LIVEVLM_EIGHT(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
                            "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define LIVEVLM_32(d) LIVEVLM_EIGHT(d, 0), LIVEVLM_EIGHT(d, 8), LIVEVLM_EIGHT(d, 16), LIVEVLM_EIGHT(d, 24)
#define LIVEVLM_64(d) LIVEVLM_32(d), LIVEVLM_EIGHT(d, 32), LIVEVLM_EIGHT(d, 40), LIVEVLM_EIGHT(d, 48), \
                      LIVEVLM_EIGHT(d, 56)
#define LIVEVLM_88(d) LIVEVLM_64(d), LIVEVLM_EIGHT(d, 64), LIVEVLM_EIGHT(d, 72), LIVEVLM_EIGHT(d, 80)
#define LIVEVLM_NAMES_32                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "     \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIVEVLM_NAMES_64                                                                      \
  LIVEVLM_NAMES_32                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, "   \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIVEVLM_NAMES_88                                                                      \
  LIVEVLM_NAMES_64                                                                            \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "   \
  "%81, %82, %83, %84, %85, %86, %87"
#define LIVEVLM_PRODUCT(FLAG, SHAPE, NAMES, OPERANDS, ...)                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " FLAG ", 0;\nwgmma.mma_async.sync.aligned." \
               SHAPE " {" NAMES "}, " OPERANDS ";\n}\n" : __VA_ARGS__)

#define LIVEVLM_LOGITS_64(TYPES)                                                                           \
  LIVEVLM_PRODUCT("%34", "m64n64k16.f32." TYPES, LIVEVLM_NAMES_32, "%32, %33, p, 1, 1, 0, 0",              \
                  LIVEVLM_32(d) : "l"(a), "l"(b), "r"(accumulate))
#define LIVEVLM_LOGITS_128(TYPES)                                                                          \
  LIVEVLM_PRODUCT("%66", "m64n128k16.f32." TYPES, LIVEVLM_NAMES_64, "%64, %65, p, 1, 1, 0, 0",             \
                  LIVEVLM_64(d) : "l"(a), "l"(b), "r"(accumulate))
#define LIVEVLM_LOGITS_176(TYPES)                                                                          \
  LIVEVLM_PRODUCT("%90", "m64n176k16.f32." TYPES, LIVEVLM_NAMES_88, "%88, %89, p, 1, 1, 0, 0",             \
                  LIVEVLM_88(d) : "l"(a), "l"(b), "r"(accumulate))
#define LIVEVLM_VALUES_64(TYPES)                                                                           \
  LIVEVLM_PRODUCT("1", "m64n64k16.f32." TYPES, LIVEVLM_NAMES_32,                                           \
                  "{%32, %33, %34, %35}, %36, p, 1, 1, 1",                                                 \
                  LIVEVLM_32(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define LIVEVLM_VALUES_128(TYPES)                                                                          \
  LIVEVLM_PRODUCT("1", "m64n128k16.f32." TYPES, LIVEVLM_NAMES_64,                                          \
                  "{%64, %65, %66, %67}, %68, p, 1, 1, 1",                                                 \
                  LIVEVLM_64(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// clang-format on

// d = a * b, or d += a * b, in the background: 64 rows of queries, kKeys rows of keys, both K-major in shared
// memory, 16 elements of each. d[4 * n + i]: keys 8 n + 2 (lane % 4) + i % 2 of the row 16 warp + lane / 4 +
// i / 2 * 8.
template <typename T, int kKeys>
__device__ __forceinline__ void wgmma_logits(float (&d)[kKeys / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kKeys == 64 || kKeys == 128 || kKeys == 176, "no other shape is written down here");
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kKeys == 64 && kHalf) LIVEVLM_LOGITS_64("f16.f16");
  if constexpr (kKeys == 64 && !kHalf) LIVEVLM_LOGITS_64("bf16.bf16");
  if constexpr (kKeys == 128 && kHalf) LIVEVLM_LOGITS_128("f16.f16");
  if constexpr (kKeys == 128 && !kHalf) LIVEVLM_LOGITS_128("bf16.bf16");
  if constexpr (kKeys == 176 && kHalf) LIVEVLM_LOGITS_176("f16.f16");
  if constexpr (kKeys == 176 && !kHalf) LIVEVLM_LOGITS_176("bf16.bf16");
}

// d += a * b: weights of 64 rows and 16 keys from registers, times values of 16 keys, MN-major in shared
// memory. a[i]: of the row 16 warp + lane / 4 + i % 2 * 8, keys 2 (lane % 4) + i / 2 * 8 and the one after.
template <typename T, int kDim>
__device__ __forceinline__ void wgmma_values(float (&d)[kDim / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kDim == 64 || kDim == 128, "no other shape is written down here");
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kDim == 64 && kHalf) LIVEVLM_VALUES_64("f16.f16");
  if constexpr (kDim == 64 && !kHalf) LIVEVLM_VALUES_64("bf16.bf16");
  if constexpr (kDim == 128 && kHalf) LIVEVLM_VALUES_128("f16.f16");
  if constexpr (kDim == 128 && !kHalf) LIVEVLM_VALUES_128("bf16.bf16");
}

#undef LIVEVLM_EIGHT
#undef LIVEVLM_32
#undef LIVEVLM_64
#undef LIVEVLM_88
#undef LIVEVLM_NAMES_32
#undef LIVEVLM_NAMES_64
#undef LIVEVLM_NAMES_88
#undef LIVEVLM_PRODUCT
#undef LIVEVLM_LOGITS_64
#undef LIVEVLM_LOGITS_128
#undef LIVEVLM_LOGITS_176
#undef LIVEVLM_VALUES_64
#undef LIVEVLM_VALUES_128

}  // namespace livevlm

#endif  // LIVEVLM_SM90A
