# SPDX-License-Identifier: Apache-2.0
"""FlashInfer, where it is installed: paged decode and prefill over the blocks of a table.

Its keys are rotated already and its index arrays are made on the host by `plan`, before the graph that is timed; they
are the same for all sets of inputs. What `plan` takes is measured apart, with everything it reads already on the host.
Outputs are allocated beforehand, because FlashInfer would fill new ones with zeros.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WORKSPACE = 256 << 20  # bytes for partial results; one for all, since calls follow one another
Plan = Callable[[], None]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> out


@functools.cache
def load() -> tuple[Any, str]:
    """The module, or None, and its name with the version, or why it is not there. Whatever importing raises counts."""
    try:
        module = importlib.import_module("flashinfer")
    except Exception as error:
        return None, f"FlashInfer cannot be imported: {type(error).__name__}: {error}"
    return module, f"FlashInfer {module.__version__}"


@functools.cache
def workspace() -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")


def pages(block_table: Tensor, num_keys: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sequence's pages start, all pages, and the keys in each last page; the first and last on the host."""
    batch, count = block_table.shape
    last = num_keys - (count - 1) * block_size
    starts = torch.arange(0, batch * count + 1, count, dtype=torch.int32)
    return starts, block_table.flatten().contiguous(), torch.full((batch,), last, dtype=torch.int32)


def decode(q: Tensor, k: Tensor, block_table: Tensor, num_keys: int) -> tuple[Plan, Run]:
    """One query a sequence. Tensor cores: its other kernel has no groups of 7 heads, and is slower."""
    flashinfer, _ = load()
    _, block_size, num_kv_heads, head_dim = k.shape
    starts, indices, last = pages(block_table, num_keys, block_size)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace(),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=starts.to(q.device),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last.to(q.device),
    )

    def plan() -> None:
        wrapper.plan(
            starts, indices, last, q.shape[1], num_kv_heads, head_dim, block_size,
            q_data_type=q.dtype, kv_data_type=k.dtype,
        )  # fmt: skip

    return plan, runner(wrapper, q)


def prefill(
    q: Tensor, k: Tensor, block_table: Tensor, num_keys: int, backend: str, *, fixed_grid: bool
) -> tuple[Plan, Run]:
    """Causal; `backend` is "fa2" or "fa3".

    Args:
        fixed_grid: plan so that a captured graph stays valid when lengths change, as questions need it. Without, the
            grid is made for these lengths: the best for a single clip.
    """
    flashinfer, _ = load()
    _, block_size, num_kv_heads, head_dim = k.shape
    starts, indices, last = pages(block_table, num_keys, block_size)
    batch = block_table.shape[0]
    q_starts = torch.arange(0, q.shape[0] + 1, q.shape[0] // batch, dtype=torch.int32)
    buffers: dict[str, Any] = {}
    if fixed_grid:
        buffers = {
            "use_cuda_graph": True,
            "qo_indptr_buf": q_starts.to(q.device),
            "paged_kv_indptr_buf": starts.to(q.device),
            "paged_kv_indices_buf": indices.clone(),
            "paged_kv_last_page_len_buf": last.to(q.device),
        }
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend=backend, **buffers)

    def plan() -> None:
        wrapper.plan(
            q_starts, starts, indices, last, q.shape[1], num_kv_heads, head_dim, block_size,
            causal=True, q_data_type=q.dtype, kv_data_type=k.dtype,
        )  # fmt: skip

    return plan, runner(wrapper, q)


def runner(wrapper: Any, like: Tensor) -> Run:
    out = torch.empty_like(like)
    return lambda q, k, v: wrapper.run(q, (k, v), out=out)
