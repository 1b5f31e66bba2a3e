# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one module per op. Imported at the first call, so that a machine without Triton can import the package."""
