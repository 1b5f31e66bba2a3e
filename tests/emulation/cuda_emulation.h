// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, from the source that nvcc compiles; included first of all in a .cu file.
//
// A fiber is one CUDA thread. One runs at a time, until it waits for others: those of its thread block come
// first. Three blocks take turns, at random, where they pass a barrier, a fence or a flag. So indices, masks,
// tails, barriers and the order of sums are as on a GPU, while races are found only as far as this order of
// threads shows them (orders differ from block to block), and speed not at all. Shared memory holds NaN bits
// (all ones) until it is written. The GPU is an sm_80: there are no clusters, TMA or wgmma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "common/dtype.h"

#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // all in one place, so that it can be filled before each block
#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())
inline constexpr int warpSize = 32;

namespace emu {

const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
int lane();
void* dynamic_shared();

// Ends the launch: emu::run throws `why`.
[[noreturn]] void fail(const char* why);
// Lets other threads run; `spinning` in loops that wait for memory to change.
void yield(bool spinning);

void run_blocks(const std::function<void()>& thread, dim3 grid, dim3 threads, size_t shared_bytes,
                const char* name);

template <typename Params>
void run(void (*kernel)(Params), dim3 grid, dim3 threads, size_t shared_bytes, const Params& params,
         const char* name) {
  run_blocks([&] { kernel(params); }, grid, threads, shared_bytes, name);
}

// Waits for the threads of the block that have not exited; tells how many gave a non-zero `predicate`.
struct Votes {
  unsigned yes, all;
};
Votes block_barrier(bool predicate);

// Waits for the lanes in `mask` that have not exited to come to the same function. The last one calls
// `combine` with all their operands; null stands for the other lanes.
using Combine = void (*)(void* const* lanes);
void warp_collective(unsigned mask, Combine combine, void* operand);

template <typename Operand, typename Function>
Operand collective(unsigned mask, Operand operand, Function) {
  warp_collective(
      mask,
      [](void* const* lanes) {
        Operand* operands[warpSize];
        for (int i = 0; i < warpSize; ++i) operands[i] = static_cast<Operand*>(lanes[i]);
        Function{}(operands);
      },
      &operand);
  return operand;
}

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Operand {
    T value, result;
    int source;
  };
  return collective(mask, Operand{value, {}, source},
                    [](Operand* const* lanes) {
                      for (int i = 0; i < warpSize; ++i) {
                        if (!lanes[i]) continue;
                        if (const Operand* from = lanes[lanes[i]->source]) {
                          lanes[i]->result = from->value;
                        } else {  // undefined on a GPU
                          std::memset(&lanes[i]->result, 0xff, sizeof(T));
                        }
                      }
                    })
      .result;
}

// Every lane gets `function` of all lanes' values, in lane order.
template <typename T, typename Function>
T reduce(unsigned mask, T value, Function) {
  return collective(mask, value, [](T* const* lanes) {
    T* first = nullptr;
    for (int i = 0; i < warpSize; ++i) {
      if (lanes[i] && first) *first = Function{}(*first, *lanes[i]);
      if (lanes[i] && !first) first = lanes[i];
    }
    for (int i = 0; i < warpSize; ++i) {
      if (lanes[i]) *lanes[i] = *first;
    }
  });
}

template <typename T>
unsigned match_any(unsigned mask, T value) {
  struct Operand {
    T value;
    unsigned equal;
  };
  return collective(mask, Operand{value, 0},
                    [](Operand* const* lanes) {
                      for (int i = 0; i < warpSize; ++i) {
                        for (int j = 0; lanes[i] && j < warpSize; ++j) {
                          if (lanes[j] && lanes[j]->value == lanes[i]->value) lanes[i]->equal |= 1u << j;
                        }
                      }
                    })
      .equal;
}

inline float widen(uint32_t pair, int half, livevlm::TypeTag<__nv_bfloat16>) {
  return std::bit_cast<float>(half ? pair & 0xffff0000u : pair << 16);
}

inline float widen(uint32_t pair, int half, livevlm::TypeTag<__half>) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(half ? pair >> 16 : pair)));
}

// ---- what livevlm's own wrappers of PTX instructions do (common/ptx.cuh, common/cuda_vec.cuh)

template <typename Tag>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tag) {
  struct Operand {
    float* d;
    const uint32_t *a, *b;
  };
  collective(0xffffffffu, Operand{d, a, b}, [](Operand* const* lanes) {
    // Lane 4 * i + j has columns 2 * j and 2 * j + 1 of the rows i and i + 8 in `a` and `d`, and row i of the
    // transposed `b`; the words for columns from 8 on come after those of the columns below.
    float x[16][16], y[8][16];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; ++row)
        x[row][k] = widen(lanes[row % 8 * 4 + k % 8 / 2]->a[k / 8 * 2 + row / 8], k % 2, Tag{});
      for (int column = 0; column < 8; ++column)
        y[column][k] = widen(lanes[column * 4 + k % 8 / 2]->b[k / 8], k % 2, Tag{});
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float& sum = lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2];
        double total = sum;
        for (int k = 0; k < 16; ++k) total += double{x[row][k]} * double{y[column][k]};
        sum = static_cast<float>(total);
      }
    }
  });
}

inline uint32_t transpose_8x8(uint32_t pair) {
  struct Operand {
    uint32_t pair, result;
  };
  return collective(0xffffffffu, Operand{pair, 0},
                    [](Operand* const* lanes) {
                      const auto at = [&](int row, int column) {
                        return lanes[row * 4 + column / 2]->pair >> (column % 2 * 16) & 0xffff;
                      };
                      for (int i = 0; i < warpSize; ++i)
                        lanes[i]->result = at(i % 4 * 2, i / 4) | at(i % 4 * 2 + 1, i / 4) << 16;
                    })
      .result;
}

template <bool kTransposed>
void load_four_matrices(uint32_t (&words)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("load_matrices: misaligned shared memory");
  struct Operand {
    const uint16_t* row;
    uint32_t* words;
  };
  collective(0xffffffffu, Operand{static_cast<const uint16_t*>(row), words}, [](Operand* const* lanes) {
    for (int i = 0; i < warpSize * 4; ++i) {
      const int lane = i % warpSize, first = i / warpSize * 8, row = lane / 4, column = lane % 4 * 2;
      const auto at = [&](int r, int c) -> uint32_t {
        return kTransposed ? lanes[first + c]->row[r] : lanes[first + r]->row[c];
      };
      lanes[lane]->words[i / warpSize] = at(row, column) | at(row, column + 1) << 16;
    }
  });
}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  load_four_matrices<false>(words, row);
}

inline void load_matrices_transposed(uint32_t (&words)[4], const void* row) {
  load_four_matrices<true>(words, row);
}

template <typename T>
T load_once(const T* source) {
  if (reinterpret_cast<uintptr_t>(source) % sizeof(T) != 0) fail("misaligned load");
  return *source;
}

inline float min_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::min(a, b);
}

inline float max_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b);
}

inline float exp2_approx(float x) {
  return std::exp2(x);
}

inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  return (word & mask) | bits;
}

inline uint32_t load_acquire(const uint32_t* flag) {
  yield(true);
  return *static_cast<const volatile uint32_t*>(flag);
}

inline void store_release(uint32_t* flag, uint32_t value) {
  *flag = value;
  yield(false);
}

inline uint32_t atomic_add_release(uint32_t* counter, uint32_t value) {
  return std::exchange(*counter, *counter + value);
}

// A cluster is one block here.
inline uint32_t cluster_rank() {
  return 0;
}
inline void cluster_arrive() {}
inline void cluster_wait() {}
inline void open_mailbox(uint64_t*, uint32_t) {}
inline void announce_mail(uint32_t, uint64_t*, uint32_t) {}
inline void send(uint32_t, uint64_t*, uint32_t* target, uint32_t value) {
  *target = value;
}
inline void send_to_add(uint32_t, uint64_t*, uint32_t* target, uint32_t value) {
  *target += value;
}
inline void wait_for_mail(uint64_t*) {
  block_barrier(false);
}

// One kernel runs at a time.
inline void wait_for_previous_kernels() {}
inline void let_next_kernel_start() {}

inline void prefetch_l2(const void*) {}

// Copies happen when they are waited for; until then the target holds NaN bits.
void cp_async16(void* shared, const void* global, bool valid);
void cp_async4(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_finish(unsigned pending);

template <int kPending>
void cp_async_wait() {
  cp_async_finish(kPending);
}

}  // namespace emu

// ---- CUDA C++

inline void __syncthreads() {
  emu::block_barrier(false);
}
inline int __syncthreads_or(int predicate) {
  return emu::block_barrier(predicate).yes > 0;
}
inline int __syncthreads_count(int predicate) {
  return static_cast<int>(emu::block_barrier(predicate).yes);
}
inline int __syncthreads_and(int predicate) {
  const emu::Votes votes = emu::block_barrier(predicate);
  return votes.yes == votes.all;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emu::reduce(mask, 0, [](int, int) { return 0; });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return emu::shuffle(mask, value, (emu::lane() & -width) | (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int source = emu::lane() - static_cast<int>(delta);
  return emu::shuffle(mask, value, source < (emu::lane() & -width) ? emu::lane() : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int source = emu::lane() + static_cast<int>(delta);
  return emu::shuffle(mask, value, source >= (emu::lane() & -width) + width ? emu::lane() : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
  const int source = emu::lane() ^ bits;
  return emu::shuffle(mask, value, source >= (emu::lane() & -width) + width ? emu::lane() : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emu::reduce(mask, predicate ? 1u << emu::lane() : 0u, std::bit_or<unsigned>{});
}
inline int __any_sync(unsigned mask, int predicate) {
  return emu::reduce(mask, predicate != 0, std::logical_or<bool>{});
}
inline int __all_sync(unsigned mask, int predicate) {
  return emu::reduce(mask, predicate != 0, std::logical_and<bool>{});
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return emu::match_any(mask, value);
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return emu::reduce(mask, value, std::plus<T>{});
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return emu::reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return emu::reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emu::reduce(mask, value, std::bit_or<unsigned>{});
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emu::reduce(mask, value, std::bit_and<unsigned>{});
}

// One thread runs at a time, so these are plain reads and writes.
template <typename T>
T atomicExch(T* target, std::type_identity_t<T> value) {
  return std::exchange(*target, value);
}
template <typename T>
T atomicAdd(T* target, std::type_identity_t<T> value) {
  return std::exchange(*target, *target + value);
}
template <typename T>
T atomicMin(T* target, std::type_identity_t<T> value) {
  return std::exchange(*target, std::min(*target, value));
}
template <typename T>
T atomicMax(T* target, std::type_identity_t<T> value) {
  return std::exchange(*target, std::max(*target, value));
}
template <typename T>
T atomicOr(T* target, std::type_identity_t<T> value) {
  return std::exchange(*target, *target | value);
}
template <typename T>
T atomicAnd(T* target, std::type_identity_t<T> value) {
  return std::exchange(*target, *target & value);
}
template <typename T>
T atomicCAS(T* target, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return std::exchange(*target, *target == expected ? value : *target);
}
inline void __threadfence() {
  emu::yield(false);
}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {
  emu::yield(true);
}
[[noreturn]] inline void __trap() {
  emu::fail("__trap()");
}

// clang-format off
template <typename T> T __ldg(const T* source) { return emu::load_once(source); }
template <typename T> T __ldcg(const T* source) { return emu::load_once(source); }
template <typename T> T __ldcs(const T* source) { return emu::load_once(source); }
template <typename T> void __stcg(T* target, std::type_identity_t<T> value) { *target = value; }
template <typename T> void __stcs(T* target, std::type_identity_t<T> value) { *target = value; }

// As on a GPU, of a number and a NaN these return the number.
template <typename A, typename B> constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B> constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    result |= ((from < 4 ? x : y) >> (from % 4 * 8) & 0xff) << (8 * i);
  }
  return result;
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __clzll(unsigned long long x) { return std::countl_zero(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __ffsll(unsigned long long x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
// clang-format on
