# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, one script an op; installed as the folder `livevlm_bench`. `livevlm bench kernels` runs them."""
