// SPDX-License-Identifier: Apache-2.0
#include "common/stream.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace livevlm {
namespace {

using GetStream = int32_t (*)(int32_t device_index, void** stream);

// Looked up at run time: the symbol lives in libtorch_cuda.so, and linking that would stop this library from
// loading under a CPU build of torch.
GetStream find_get_stream() {
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
  return reinterpret_cast<GetStream>(symbol);
}

}  // namespace

void* current_cuda_stream(int32_t device_index) {
  static const GetStream get_stream = find_get_stream();
  STD_TORCH_CHECK(get_stream != nullptr, "this torch build has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(device_index, &stream) == 0, "no current CUDA stream on device ", device_index);
  return stream;
}

}  // namespace livevlm
