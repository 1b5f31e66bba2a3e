# SPDX-License-Identifier: Apache-2.0
"""Whether kernels are interpreted on the CPU, by TRITON_INTERPRET=1: slowly, and with a `tl.dot` without bfloat16."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
