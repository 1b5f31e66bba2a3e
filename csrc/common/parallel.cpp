// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace livevlm {

void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFunction body, void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [=](int64_t first, int64_t last) { body(first, last, context); });
}

}  // namespace livevlm
