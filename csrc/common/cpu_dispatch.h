// SPDX-License-Identifier: Apache-2.0
// Picks the build of a CPU kernel that this processor can run. See cpu_float.h for why there are several.
#pragma once

#include <cstdlib>
#include <string_view>

namespace livevlm {

#ifdef LIVEVLM_WITH_AVX2
// LIVEVLM_CPU=baseline in the environment turns AVX2 off, so that tests reach the other build too.
inline bool use_avx2() {
  static const bool use = [] {
    const char* wanted = std::getenv("LIVEVLM_CPU");
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && !(wanted && std::string_view(wanted) == "baseline");
  }();
  return use;
}
#endif

}  // namespace livevlm

// Declares `void name(const Params&)` in each namespace that its source is compiled into.
#ifdef LIVEVLM_WITH_AVX2
#define LIVEVLM_CPU_KERNEL(name, Params) \
  namespace baseline {                   \
  void name(const Params& params);       \
  }                                      \
  namespace avx2 {                       \
  void name(const Params& params);       \
  }
#define LIVEVLM_CPU_CALL(name, params) (use_avx2() ? avx2::name(params) : baseline::name(params))
#else
#define LIVEVLM_CPU_KERNEL(name, Params) \
  namespace baseline {                   \
  void name(const Params& params);       \
  }
#define LIVEVLM_CPU_CALL(name, params) baseline::name(params)
#endif
