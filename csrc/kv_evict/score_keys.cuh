// SPDX-License-Identifier: Apache-2.0
// Keys in registers, for the tensor core versions of `score_tokens`.
//
// A thread reads 16 bytes of a key or query at once, which it uses in two matrix products. That is another
// order of the elements than the instructions name, but the same for both operands, and a dot product has no
// order. A rotated pair, head_dim / 2 apart, falls to one thread.
#pragma once

#include "kv_evict/score_tokens.cuh"

namespace livevlm {

// Four keys of a thread, as they are loaded: keys lane / 4 + 8 * i of the warp's 32, in pieces of 8 elements,
// 32 apart.
template <typename T, int kDim, int kKeys>
struct LoadedKeys {
  static constexpr int kBlocks = kDim / 32;
  uint4 words[kKeys][kBlocks];

  // Keys past the end become zeros; what is there is not read.
  __device__ __forceinline__ void load(const ScoreKernel& p, const ScoreTask& task, int32_t first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int32_t token = first + i * 8 + lane / 4;
      const T* key = key_of<T>(p, task, token) + lane % 4 * 8;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        words[i][block] = make_uint4(0, 0, 0, 0);
        if (token < task.end) words[i][block] = load_once(reinterpret_cast<const uint4*>(key + block * 32));
      }
    }
  }

  __device__ __forceinline__ void rotate(const ScoreKernel& p, const ScoreTask& task, int32_t first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int32_t token = min(first + i * 8 + lane / 4, task.length - 1);
      const float* angles = angles_of(p, task, token) + lane % 4 * 8;
      __syncwarp();  // else the compiler loads the angles of all at once, into registers it does not
                     // have
#pragma unroll
      for (int block = 0; block < kBlocks / 2; ++block) {
        uint32_t low[4], high[4];
        take(words[i][block], low);
        take(words[i][block + kBlocks / 2], high);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 cosine = *reinterpret_cast<const float2*>(angles + block * 32 + 2 * j);
          const float2 sine = *reinterpret_cast<const float2*>(angles + kDim / 2 + block * 32 + 2 * j);
          const float2 a = widen_pair(low[j], TypeTag<T>{}), b = widen_pair(high[j], TypeTag<T>{});
          low[j] = narrow_pair(a.x * cosine.x - b.x * sine.x, a.y * cosine.y - b.y * sine.y, TypeTag<T>{});
          high[j] = narrow_pair(b.x * cosine.x + a.x * sine.x, b.y * cosine.y + a.y * sine.y, TypeTag<T>{});
        }
        words[i][block] = make_uint4(low[0], low[1], low[2], low[3]);
        words[i][block + kBlocks / 2] = make_uint4(high[0], high[1], high[2], high[3]);
      }
    }
  }

 private:
  static __device__ __forceinline__ void take(uint4 from, uint32_t (&to)[4]) {
    to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
  }
};

// The same, as operands of products: what one instruction takes lies in neighbouring registers.
template <typename T, int kDim, int kKeys>
struct KeyOperands {
  static constexpr int kBlocks = kDim / 32;
  uint32_t operands[kBlocks][2][kKeys / 2][4];  // [32 elements][half of them][16 keys]

  __device__ __forceinline__ void take(const LoadedKeys<T, kDim, kKeys>& loaded) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int m = 0; m < kKeys / 2; ++m) {
        const uint4 upper = loaded.words[2 * m][block], lower = loaded.words[2 * m + 1][block];
        uint32_t (&first)[4] = operands[block][0][m], (&second)[4] = operands[block][1][m];
        first[0] = upper.x, first[1] = lower.x, first[2] = upper.y, first[3] = lower.y;
        second[0] = upper.z, second[1] = lower.z, second[2] = upper.w, second[3] = lower.w;
      }
    }
  }
};

}  // namespace livevlm
