# SPDX-License-Identifier: Apache-2.0
"""Eager PyTorch definitions of the ops: the specification that every backend is tested against."""
