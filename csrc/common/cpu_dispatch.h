// SPDX-License-Identifier: Apache-2.0
// Picks the build of a CPU kernel that this processor can run. See cpu_float.h for why there are several.
#pragma once

// Declares `void name(const Params&)` in each namespace it is compiled into, and itself outside them.
#ifdef LIVEVLM_WITH_AVX2
#define LIVEVLM_CPU_KERNEL(name, Params)                                                                   \
  namespace baseline {                                                                                     \
  void name(const Params& params);                                                                         \
  }                                                                                                        \
  namespace avx2 {                                                                                         \
  void name(const Params& params);                                                                         \
  }                                                                                                        \
  inline void name(const Params& params) {                                                                 \
    const bool able =                                                                                      \
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); \
    able ? avx2::name(params) : baseline::name(params);                                                    \
  }
#else
#define LIVEVLM_CPU_KERNEL(name, Params)   \
  namespace baseline {                     \
  void name(const Params& params);         \
  }                                        \
  inline void name(const Params& params) { \
    baseline::name(params);                \
  }
#endif
