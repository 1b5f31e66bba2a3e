# SPDX-License-Identifier: Apache-2.0
"""Kernels for streaming video memories: KV eviction, KV merging and attention over retrieved blocks.

Every op takes PyTorch tensors, runs on CPU and CUDA, and is defined by eager PyTorch in `livevlm_kernels.reference`.
"""

from livevlm_kernels._registry import BACKENDS, backends
from livevlm_kernels.block_attention import block_attention
from livevlm_kernels.compact_tokens import compact_tokens
from livevlm_kernels.errors import ArgumentError, BackendError
from livevlm_kernels.evict_similar import evict_similar
from livevlm_kernels.merge_states import merge_states
from livevlm_kernels.merge_tokens import merge_tokens
from livevlm_kernels.quantize_blocks import QuantizedBlocks, quantize_blocks
from livevlm_kernels.retrieve_blocks import retrieve_blocks
from livevlm_kernels.score_novelty import score_novelty
from livevlm_kernels.score_redundancy import score_redundancy
from livevlm_kernels.score_tokens import score_tokens
from livevlm_kernels.select_tokens import select_tokens
from livevlm_kernels.summarize_blocks import summarize_blocks

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "ArgumentError",
    "BackendError",
    "QuantizedBlocks",
    "backends",
    "block_attention",
    "compact_tokens",
    "evict_similar",
    "merge_states",
    "merge_tokens",
    "quantize_blocks",
    "retrieve_blocks",
    "score_novelty",
    "score_redundancy",
    "score_tokens",
    "select_tokens",
    "summarize_blocks",
]
