# SPDX-License-Identifier: Apache-2.0
"""Answer quality: how many questions streams answer right, under one protocol for all memories."""
