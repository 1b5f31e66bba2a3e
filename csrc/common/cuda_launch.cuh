// SPDX-License-Identifier: Apache-2.0
// Host side of kernel launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifndef LIVEVLM_EMULATED
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/tokens.h"

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

// A template argument as a value.
template <int kValue>
struct IntTag {
  static constexpr int value = kValue;
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

// Whether a tensor can be read 16 bytes at a time, head by head.
inline bool vectorised(const Tokens& tokens, int64_t head_dim, int64_t element_size) {
  return tokens.stride_dim == 1 && head_dim * element_size % 16 == 0 &&
         rows_aligned16(tokens.data, element_size,
                        {tokens.stride_batch, tokens.stride_token, tokens.stride_head});
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Throws if a call of the CUDA runtime failed.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message +=
        "; livevlm was built for " LIVEVLM_CUDA_ARCHS ". Reinstall it with LIVEVLM_CUDA_ARCHS for this GPU";
  }
  throw std::runtime_error(message);
}

#ifndef LIVEVLM_EMULATED
// More than 48 KiB of dynamic shared memory must be asked for.
template <typename Params>
void allow_shared_bytes(void (*kernel)(Params), size_t bytes, const char* name) {
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      name);
}
#endif

// The way kernels are launched: tests/emulation runs them on the CPU from here. Throws if the launch was
// refused; does not wait for the kernel.
template <typename Params>
void launch_kernel(void (*kernel)(Params), dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream,
                   const Params& params, const char* name) {
#ifdef LIVEVLM_EMULATED
  static_cast<void>(stream);
  emu::run(kernel, grid, threads, shared_bytes, params, name);
#else
  if (shared_bytes > 48 * 1024) allow_shared_bytes(kernel, shared_bytes, name);
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  check_cuda(cudaGetLastError(), name);
#endif
}

#ifndef LIVEVLM_EMULATED
// Whether a kernel was compiled for sm_90 or later: code for sm_80 that runs on an sm_90 does not count.
template <typename Params>
bool built_for_hopper(void (*kernel)(Params), const char* name) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), name);
  return attributes.ptxVersion >= 90;
}

// An overlapping launch (see below) of clusters of `cluster_size` thread blocks, for GPUs from sm_90 on.
template <typename Params>
class HopperLaunch {
 public:
  HopperLaunch(void (*kernel)(Params), dim3 grid, dim3 threads, size_t shared_bytes, cudaStream_t stream,
               int cluster_size, const char* name)
      : kernel_(kernel), name_(name) {
    if (shared_bytes > 48 * 1024) allow_shared_bytes(kernel, shared_bytes, name);
    if (cluster_size > 8) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
    }
    attributes_[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[0].val.programmaticStreamSerializationAllowed = 1;
    attributes_[1].id = cudaLaunchAttributeClusterDimension;
    attributes_[1].val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
    config_.gridDim = grid;
    config_.blockDim = threads;
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    config_.numAttrs = cluster_size > 1 ? 2 : 1;
  }
  HopperLaunch(const HopperLaunch&) = delete;

  // Whether the GPU has a place for a cluster.
  bool fits() {
    int clusters = 0;
    const bool fits =
        cudaOccupancyMaxActiveClusters(&clusters, kernel_, &config_) == cudaSuccess && clusters > 0;
    if (!fits) cudaGetLastError();
    return fits;
  }

  void run(const Params& params) { check_cuda(cudaLaunchKernelEx(&config_, kernel_, params), name_); }

 private:
  void (*kernel_)(Params);
  const char* name_;
  cudaLaunchAttribute attributes_[2]{};
  cudaLaunchConfig_t config_{};
};
#endif

// The same, but the kernel may start while the one before it on the stream ends, if that one calls
// let_next_kernel_start(). The kernel must call wait_for_previous_kernels(): see common/ptx.cuh. The first
// kernel of an op must do so before it reads anything: those before it are of others.
template <typename Params>
void launch_overlapping(void (*kernel)(Params), dim3 grid, dim3 threads, size_t shared_bytes,
                        cudaStream_t stream, const Params& params, const char* name) {
#ifndef LIVEVLM_EMULATED
  if (built_for_hopper(kernel, name))
    return HopperLaunch<Params>(kernel, grid, threads, shared_bytes, stream, 1, name).run(params);
#endif
  launch_kernel(kernel, grid, threads, shared_bytes, stream, params, name);
}

inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
  return value;
}

// Bytes of shared memory that a thread block can have on the current device.
inline int64_t max_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

inline int64_t compute_capability_major() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor);
}

// Whether kernels with warpgroup products can run: they are empty in any other code than that for sm_90a.
inline bool has_warpgroup_products() {
#ifdef LIVEVLM_EMULATED
  return false;
#else
  static const bool built = std::strstr(LIVEVLM_CUDA_ARCHS, "90a") != nullptr;
  return built && compute_capability_major() == 9;
#endif
}

// Zeroes scratch memory, in the order of the stream.
inline void zero(void* memory, int64_t bytes, cudaStream_t stream) {
#ifdef LIVEVLM_EMULATED
  static_cast<void>(stream);
  std::memset(memory, 0, static_cast<size_t>(bytes));
#else
  check_cuda(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream), "scratch memory");
#endif
}

// A one-dimensional grid.
inline dim3 grid_of(int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::runtime_error("these tensors need more thread blocks than a launch can have");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace livevlm
