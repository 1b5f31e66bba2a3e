// SPDX-License-Identifier: Apache-2.0
// Element types a kernel can be asked for. Known to kernels and to the torch side, so it includes neither.
#pragma once

namespace livevlm {

enum class DType { kFloat32, kFloat16, kBFloat16 };

template <typename T>
struct TypeTag {
  using type = T;
};

}  // namespace livevlm
