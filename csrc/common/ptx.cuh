// SPDX-License-Identifier: Apache-2.0
// The PTX instructions that CUDA C++ has no function for. tests/emulation has its own version of each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace livevlm {

#ifdef LIVEVLM_EMULATED
using emu::and_or;
using emu::announce_mail;
using emu::cluster_arrive;
using emu::cluster_rank;
using emu::cluster_wait;
using emu::cp_async16;
using emu::cp_async4;
using emu::cp_async_commit;
using emu::cp_async_wait;
using emu::exp2_approx;
using emu::let_next_kernel_start;
using emu::load_acquire;
using emu::load_matrices;
using emu::load_matrices_transposed;
using emu::max_or_nan;
using emu::min_or_nan;
using emu::mma_m16n8k16;
using emu::open_mailbox;
using emu::prefetch_l2;
using emu::send;
using emu::send_to_add;
using emu::store_release;
using emu::transpose_8x8;
using emu::wait_for_mail;
using emu::wait_for_previous_kernels;
#else

// For kernels that `launch_overlapping` starts before those ahead of them have ended. Until
// wait_for_previous_kernels() returns, such a kernel must not write, and may read only what none of those
// writes; or, if the kernel before it calls this ahead of let_next_kernel_start(), only what that one does
// not write. All its blocks must call it, or the kernel after it would not wait for those ahead. Does nothing
// in other kernels, and before sm_90.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel, if launched so, may start as soon as all blocks of this one have called this or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for the line of memory that holds an address, and does not wait for it.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Flags between thread blocks. Loads and stores before a release are seen by whoever acquires its value.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Clusters of thread blocks, which reach into each other's shared memory; from sm_90. Before it, and in a
// kernel that was launched without, a thread block is a cluster of its own.
__device__ __forceinline__ uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// A barrier of the cluster in two halves: until all its blocks have started, none may write to another. What
// a thread wrote before it arrived is seen after the wait. One warp may wait for its block, and a
// __syncthreads() follow. That is slow; mail is not.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Mail between the blocks of a cluster: words are written to another's shared memory, whose threads wait in
// wait_for_mail() until all is there. A mailbox is used once; a block must not end before it has got all that
// is sent to it.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t address_in_block(uint32_t rank, const void* own) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank));
  return address;
}
#endif

// By one thread, before the cluster_arrive() at the start.
__device__ __forceinline__ void open_mailbox(uint64_t* box, uint32_t senders) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(box))),
      "r"(senders)
      : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// By one thread of each sender: how many words it sends to block `rank`, before or after it does.
__device__ __forceinline__ void announce_mail(uint32_t rank, uint64_t* box, uint32_t words) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(
                   address_in_block(rank, box)),
               "r"(words * 4)
               : "memory");
#endif
}

// `*target = value` in block `rank`.
__device__ __forceinline__ void send(uint32_t rank, uint64_t* box, uint32_t* target, uint32_t value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   address_in_block(rank, target)),
               "r"(value), "r"(address_in_block(rank, box))
               : "memory");
#else
  *target = value;
#endif
}

// `*target += value` in block `rank`.
__device__ __forceinline__ void send_to_add(uint32_t rank, uint64_t* box, uint32_t* target, uint32_t value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%0], %1, [%2];" ::"r"(
          address_in_block(rank, target)),
      "r"(value), "r"(address_in_block(rank, box))
      : "memory");
#else
  atomicAdd(target, value);
#endif
}

// By all threads.
__device__ __forceinline__ void wait_for_mail(uint64_t* box) {
#if __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(box));
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address)
        : "memory");
  }
#else
  __syncthreads();
#endif
}

// As torch.amin and amax, these return NaN if either value is one; fminf and fmaxf would return the other.
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// d += a * b for a 16x16 row-major `a` and a 16x8 column-major `b`, spread over the warp as PTX defines.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             TypeTag<__nv_bfloat16>) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             TypeTag<__half>) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The transpose of an 8x8 matrix of 16-bit elements: a lane has row lane / 4, columns lane % 4 * 2 + {0, 1}.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Four 8x8 matrices of 16-bit elements from shared memory. Lane i names row i % 8 of matrix i / 8, 16 bytes;
// words[j] gets row lane / 4, columns lane % 4 * 2 + {0, 1} of matrix j, or of its transpose.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// word & mask | bits, in one instruction: with two constants the compiler makes it two.
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

#if __CUDA_ARCH__ >= 890
// Two numbers in e4m3 as halves.
__device__ __forceinline__ uint32_t e4m3_to_halves(uint16_t codes) {
  uint32_t result;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(codes));
  return result;
}
#endif

// Copies 16 bytes from global to shared memory in the background, or writes zeros if not `valid`.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace livevlm

// Dynamic shared memory as an array of `Type`.
#ifdef LIVEVLM_EMULATED
#define LIVEVLM_DYNAMIC_SHARED(Type, name) Type* name = static_cast<Type*>(emu::dynamic_shared())
#else
#define LIVEVLM_DYNAMIC_SHARED(Type, name)                                 \
  extern __shared__ __align__(128) unsigned char livevlm_dynamic_shared[]; \
  Type* name = reinterpret_cast<Type*>(livevlm_dynamic_shared)
#endif
