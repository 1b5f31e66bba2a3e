// SPDX-License-Identifier: Apache-2.0
// torch's CPU thread pool, without a torch header: kernels must not depend on the framework.
#pragma once

#include <cstdint>

namespace livevlm {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Splits [begin, end) into ranges of at least `grain` and runs them; returns when all are done.
void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFunction body, void* context);

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body) {
  parallel_for(
      begin, end, grain,
      [](int64_t first, int64_t last, void* context) { (*static_cast<Body*>(context))(first, last); }, &body);
}

}  // namespace livevlm
