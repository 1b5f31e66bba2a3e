# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one module per op, imported at the first call: the package itself must load without Triton."""
