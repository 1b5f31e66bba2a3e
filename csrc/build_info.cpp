// SPDX-License-Identifier: Apache-2.0
// How this library was built, for `livevlm_kernels.env`. The only file that needs Python at build time;
// optional.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build_info, module) {
  module.attr("cuda_archs") = LIVEVLM_CUDA_ARCHS;
  module.attr("cuda_compiler") = LIVEVLM_CUDA_COMPILER;
  module.attr("cuda_flags") = LIVEVLM_CUDA_FLAGS;
  module.attr("cxx_compiler") = LIVEVLM_CXX_COMPILER;
  module.attr("cxx_flags") = LIVEVLM_CXX_FLAGS;
  module.attr("build_type") = LIVEVLM_BUILD_TYPE;
  module.attr("torch_version") = LIVEVLM_TORCH_VERSION;
  module.attr("torch_abi_target") = LIVEVLM_TORCH_ABI_TARGET;
}
