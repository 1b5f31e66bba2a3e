// SPDX-License-Identifier: Apache-2.0
// Host side of kernel launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace livevlm {

inline constexpr int64_t kMaxGridYZ = 65535;

// Calls body(TypeTag<T>{}) with the element type of `dtype`.
template <typename Body>
void dispatch_float(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
  }
}

// Calls body(std::true_type-like constant) so that `flag` can be a template argument.
template <bool kValue>
struct BoolTag {
  static constexpr bool value = kValue;
};

template <typename Body>
void dispatch_bool(bool flag, Body body) {
  return flag ? body(BoolTag<true>{}) : body(BoolTag<false>{});
}

inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether rows of `element_size`-byte elements at `pointer` can be read 16 bytes at a time: every stride
// between rows must keep the alignment. The innermost stride must be 1 and the row length divisible, which
// the caller checks.
inline bool rows_aligned16(const void* pointer, int64_t element_size,
                           std::initializer_list<int64_t> strides) {
  for (const int64_t stride : strides) {
    if (stride * element_size % 16 != 0) return false;
  }
  return aligned16(pointer);
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Throws if the launch just made was refused. Does not wait for the kernel.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string message = std::string(kernel) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message +=
        "; livevlm was built for " LIVEVLM_CUDA_ARCHS ". Reinstall it with LIVEVLM_CUDA_ARCHS for this GPU";
  }
  throw std::runtime_error(message);
}

}  // namespace livevlm
