// SPDX-License-Identifier: Apache-2.0
// Hopper's warpgroup matrix products, of 64 rows from registers or shared memory and 64 or 128 columns from
// shared memory, and the barriers in shared memory that hand its contents from one group of warps to another.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

// Instructions that only machine code for sm_90a may hold.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LIVEVLM_SM90A 1
#endif

namespace livevlm {

#ifdef LIVEVLM_SM90A

// Shared memory written by ordinary stores or cp.async, before products read it.
__device__ __forceinline__ void wgmma_fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before the first product after registers that it uses were written.
__device__ __forceinline__ void wgmma_arrive() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Rows of 64 elements each, 128 bytes, K-major, swizzled by 128 bytes: 16-byte piece i of row r lies at
// i ^ r % 8. `address` is 1024-byte aligned, plus 32 for each 16 elements further.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// Barriers of two warpgroups: one waits until the other has arrived. 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#define LIVEVLM_WGMMA(TYPES)                                                                              \
  asm volatile(                                                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES                                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
      "%21, "                                                                                             \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"    \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),   \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),          \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),        \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),        \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// d = a * b, or d += a * b, in the background. `d[4 * n + i]` is element i of the fragment of columns 8 n to
// 8 n + 7.
__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                                int accumulate, TypeTag<__nv_bfloat16>) {
  LIVEVLM_WGMMA("bf16.bf16");
}

__device__ __forceinline__ void wgmma_m64n64k16(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                                int accumulate, TypeTag<__half>) {
  LIVEVLM_WGMMA("f16.f16");
}

#undef LIVEVLM_WGMMA

#define LIVEVLM_EIGHT(d, i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])

#define LIVEVLM_WGMMA_64(TYPES)                                                                           \
  asm volatile(                                                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES                                                 \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}\n"             \
      : LIVEVLM_EIGHT(d, 0), LIVEVLM_EIGHT(d, 8), LIVEVLM_EIGHT(d, 16), LIVEVLM_EIGHT(d, 24)              \
      : "l"(a), "l"(b), "r"(accumulate))

#define LIVEVLM_WGMMA_128(TYPES)                                                                          \
  asm volatile(                                                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPES                                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "   \
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "   \
      "%59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n}\n"                                           \
      : LIVEVLM_EIGHT(d, 0), LIVEVLM_EIGHT(d, 8), LIVEVLM_EIGHT(d, 16), LIVEVLM_EIGHT(d, 24),             \
        LIVEVLM_EIGHT(d, 32), LIVEVLM_EIGHT(d, 40), LIVEVLM_EIGHT(d, 48), LIVEVLM_EIGHT(d, 56)            \
      : "l"(a), "l"(b), "r"(accumulate))

// The same with both matrices in shared memory, and kColumns = 64 or 128; `d` may be longer than it need be.
template <int kColumns>
__device__ __forceinline__ void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b, int accumulate,
                                             TypeTag<__nv_bfloat16>) {
  static_assert(kColumns == 64 || kColumns == 128, "no other shape is written down here");
  if constexpr (kColumns == 64) {
    LIVEVLM_WGMMA_64("bf16.bf16");
  } else {
    LIVEVLM_WGMMA_128("bf16.bf16");
  }
}

template <int kColumns>
__device__ __forceinline__ void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b, int accumulate,
                                             TypeTag<__half>) {
  static_assert(kColumns == 64 || kColumns == 128, "no other shape is written down here");
  if constexpr (kColumns == 64) {
    LIVEVLM_WGMMA_64("f16.f16");
  } else {
    LIVEVLM_WGMMA_128("f16.f16");
  }
}

#undef LIVEVLM_EIGHT
#undef LIVEVLM_WGMMA_64
#undef LIVEVLM_WGMMA_128

// Keeps uses of `d` behind the wait for its products: the compiler doesn't see that they depend on it.
template <int kSize>
__device__ __forceinline__ void wgmma_landed(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// A barrier in 8 bytes of shared memory at `address`. Its phases take turns: `phase` of a wait is 0 for the
// first time that all `arrivals` have come, then 1, then 0; waiting for 1 at the start returns at once.
__device__ __forceinline__ void shared_barrier_init(uint32_t address, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void shared_barrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}

// Arrives once all that this thread has started with cp.async is there.
__device__ __forceinline__ void shared_barrier_arrive_copied(uint32_t address) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address) : "memory");
}

__device__ __forceinline__ void shared_barrier_wait(uint32_t address, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n}\n" ::"r"(address),
      "r"(phase)
      : "memory");
}

#endif  // LIVEVLM_SM90A

}  // namespace livevlm
