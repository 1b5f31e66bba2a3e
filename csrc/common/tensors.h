// SPDX-License-Identifier: Apache-2.0
// Unpacks stable tensors into what kernels take: pointers, sizes, strides. For binding files only.
//
// The Python API has checked every argument already. These checks repeat what would otherwise be a wild
// memory access when someone calls the dispatcher op directly.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "common/dtype.h"

namespace livevlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType float_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

template <size_t kDims>
std::array<int64_t, kDims> sizes_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == int64_t{kDims}, name, " must have ", kDims, " dimensions, not ",
                  tensor.dim());
  std::array<int64_t, kDims> sizes;
  for (size_t i = 0; i < kDims; ++i) sizes[i] = tensor.size(static_cast<int64_t>(i));
  return sizes;
}

// Strides in elements. A dimension of size 1 gets 0: torch lets it have any stride, and alignment checks must
// not care.
template <size_t kDims>
std::array<int64_t, kDims> strides_of(const Tensor& tensor) {
  std::array<int64_t, kDims> strides;
  for (size_t i = 0; i < kDims; ++i) {
    const auto dim = static_cast<int64_t>(i);
    strides[i] = tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
  }
  return strides;
}

// Whether a tensor goes to the CUDA kernels. tests/emulation runs those on CPU tensors.
inline bool use_cuda(const Tensor& tensor) {
#if defined(LIVEVLM_EMULATED)
  static_cast<void>(tensor);
  return true;
#elif defined(LIVEVLM_WITH_CUDA)
  return tensor.is_cuda();
#else
  static_cast<void>(tensor);
  return false;
#endif
}

#ifdef LIVEVLM_EMULATED
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#else
using torch::stable::accelerator::DeviceGuard;
#endif

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu() &&
                      tensor.get_device_index() == like.get_device_index(),
                  name, " is on another device than the first tensor argument");
}

// Data of a contiguous tensor with `numel` elements of type T on the device of `like`.
template <typename T>
T* contiguous_data(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel,
                   const Tensor& like) {
  check_same_device(tensor, name, like);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements, not ", tensor.numel());
  return static_cast<T*>(tensor.data_ptr());
}

// Data of an optional int32 vector, such as seq_lens; nullptr if there is none.
inline const int32_t* optional_int32(const std::optional<Tensor>& tensor, const char* name, int64_t numel,
                                     const Tensor& like) {
  if (!tensor) return nullptr;
  return contiguous_data<const int32_t>(*tensor, name, ScalarType::Int, numel, like);
}

}  // namespace livevlm
