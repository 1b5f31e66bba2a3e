// SPDX-License-Identifier: Apache-2.0
// Kernels that test the emulation itself; tests/test_emulation.py runs them by name.
#include <string>
#include <string_view>

#include "common/cuda_launch.cuh"
#include "common/ptx.cuh"

namespace livevlm {
namespace {

struct Params {
  const uint32_t* in;
  uint32_t* out;
};

template <bool kBarrier>
__global__ void reverse(const __grid_constant__ Params p) {
  LIVEVLM_DYNAMIC_SHARED(uint32_t, dynamic);
  __shared__ uint32_t fixed[64];
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, last = blockDim.x - 1;
  dynamic[threadIdx.x] = p.in[i];
  fixed[threadIdx.x] = p.in[i];
  if (kBarrier) __syncthreads();
  p.out[2 * i] = dynamic[last - threadIdx.x];
  p.out[2 * i + 1] = fixed[last - threadIdx.x];
}

__global__ void warp_functions(const __grid_constant__ Params p) {
  const uint32_t value = p.in[threadIdx.x];
  const unsigned warp = threadIdx.x / 32 == 0 ? 0xffffffffu : 0xffffu;  // the second warp has 16 lanes
  const int signed_value = static_cast<int>(value) - 40;
  const uint64_t wide = (uint64_t{value} << 32) + threadIdx.x;
  const unsigned results[] = {
      __shfl_sync(warp, value, 3),
      __shfl_sync(warp, value, 3, 8),
      __shfl_up_sync(warp, value, 2, 8),
      __shfl_down_sync(warp, value, 2, 8),
      __shfl_xor_sync(warp, value, 5, 16),
      static_cast<unsigned>(__shfl_xor_sync(warp, wide, 1) >> 32),
      __float_as_uint(__shfl_xor_sync(warp, static_cast<float>(value), 1)),
      __ballot_sync(warp, value % 3 == 0),
      static_cast<unsigned>(__any_sync(warp, value == p.in[35])),
      static_cast<unsigned>(__all_sync(warp, value < 1000)),
      __match_any_sync(warp, value % 4),
      __reduce_add_sync(warp, value),
      static_cast<unsigned>(__reduce_min_sync(warp, signed_value)),
      __reduce_max_sync(warp, value),
      static_cast<unsigned>(__syncthreads_count(value % 3 == 0)),
      static_cast<unsigned>(__syncthreads_or(threadIdx.x == 40)),
      static_cast<unsigned>(__syncthreads_and(threadIdx.x != 40)),
  };
  constexpr unsigned kResults = sizeof results / sizeof *results;
  for (unsigned i = 0; i < kResults; ++i) p.out[threadIdx.x * kResults + i] = results[i];
}

// Two halves of a warp go separate ways, and some of its lanes end before the others.
__global__ void diverge(const __grid_constant__ Params p) {
  const unsigned i = threadIdx.x;
  if (i % 8 == 7) return;
  const unsigned half = i < 16 ? 0xffffu : 0xffff0000u;
  uint32_t value = p.in[i];
  for (unsigned k = 0; k < (i < 16 ? 3 : 1); ++k) value = __reduce_add_sync(half, value);
  __syncthreads();
  p.out[i] = __reduce_max_sync(0xffffffffu, value);
}

template <typename T>
__global__ void matmul(const __grid_constant__ Params p) {
  const auto* a = p.in;  // two 16-bit numbers in a word: 16 rows of 8 words; then b transposed, 8 rows of 8
  const auto* b = p.in + 128;
  const unsigned row = threadIdx.x / 4, pair = threadIdx.x % 4;
  float d[4] = {1, 1, 1, 1};
  const uint32_t first[4] = {a[row * 8 + pair], a[(row + 8) * 8 + pair], a[row * 8 + pair + 4],
                             a[(row + 8) * 8 + pair + 4]};
  const uint32_t second[2] = {b[row * 8 + pair], b[row * 8 + pair + 4]};
  mma_m16n8k16(d, first, second, TypeTag<T>{});
  for (unsigned i = 0; i < 4; ++i) p.out[(row + i / 2 * 8) * 8 + pair * 2 + i % 2] = __float_as_uint(d[i]);
}

__global__ void copy_async(const __grid_constant__ Params p) {
  __shared__ uint4 buffer[3];
  for (int i = 0; i < 3; ++i) {
    cp_async16(&buffer[i], p.in + 4 * i, i != 1);
    cp_async_commit();
  }
  cp_async_wait<1>();
  for (int i = 0; i < 3; ++i) p.out[i] = buffer[i].x;
  cp_async_wait<0>();
  p.out[3] = buffer[2].x;
}

__global__ void wait_for_flag(const __grid_constant__ Params p) {
  if (threadIdx.x == 40) store_release(p.out, p.in[0]);
  while (load_acquire(p.out) != 7) {
  }
  atomicAdd(p.out + 1, 1u);
  atomicMax(p.out + 2, threadIdx.x);
}

// Two blocks at a time wait for each other.
__global__ void wait_for_block(const __grid_constant__ Params p) {
  LIVEVLM_DYNAMIC_SHARED(uint32_t, dynamic);
  __shared__ uint32_t fixed;
  if (threadIdx.x == 0) {
    fixed = dynamic[0] = blockIdx.x;
    store_release(p.out + blockIdx.x, 7);
  }
  while (load_acquire(p.out + (blockIdx.x ^ 1)) != 7) {
  }
  __syncthreads();
  atomicAdd(p.out + 8, unsigned{fixed == blockIdx.x && dynamic[0] == blockIdx.x});
}

__global__ void deadlock(const __grid_constant__ Params) {
  threadIdx.x < 16 ? __syncthreads() : __syncwarp();
}

__global__ void wrong_mask(const __grid_constant__ Params) {
  __syncwarp(1);
}

using Kernel = void (*)(Params);
struct Test {
  std::string_view name;
  Kernel kernel;
  unsigned blocks, threads;
  size_t shared_bytes;
};
constexpr Test kTests[] = {
    {"reverse", reverse<true>, 2, 64, 64 * 4},
    {"no_barrier", reverse<false>, 2, 64, 64 * 4},
    {"too_many_threads", reverse<true>, 1, 1025, 64 * 4},
    {"too_much_shared", reverse<true>, 1, 64, 164 * 1024},
    {"warp_functions", warp_functions, 1, 48, 0},
    {"diverge", diverge, 1, 32, 0},
    {"matmul_bfloat16", matmul<__nv_bfloat16>, 1, 32, 0},
    {"matmul_float16", matmul<__half>, 1, 32, 0},
    {"copy_async", copy_async, 1, 1, 0},
    {"wait_for_flag", wait_for_flag, 1, 64, 0},
    {"wait_for_block", wait_for_block, 8, 32, 4},
    {"deadlock", deadlock, 1, 32, 0},
    {"wrong_mask", wrong_mask, 1, 32, 0},
};

}  // namespace
}  // namespace livevlm

// Runs a test's kernel; returns the error, or nothing.
extern "C" __attribute__((visibility("default"))) const char* livevlm_emulation_test(const char* name,
                                                                                     const uint32_t* in,
                                                                                     uint32_t* out) {
  static std::string error;
  error = "no such test";
  for (const livevlm::Test& test : livevlm::kTests) {
    if (test.name != name) continue;
    try {
      livevlm::launch_kernel(test.kernel, test.blocks, test.threads, test.shared_bytes, nullptr,
                             livevlm::Params{in, out}, name);
      error.clear();
    } catch (const std::exception& exception) {
      error = exception.what();
    }
  }
  return error.c_str();
}
