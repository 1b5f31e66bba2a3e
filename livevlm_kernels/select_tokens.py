# SPDX-License-Identifier: Apache-2.0
"""Which tokens stay in the memory: top-k under a budget, or top-k and one winner per stretch of time."""

from __future__ import annotations

import torch
from torch import Tensor

from livevlm_kernels import _attention_checks as attention
from livevlm_kernels import _checks as check
from livevlm_kernels._registry import define, overload
from livevlm_kernels.errors import ArgumentError
from livevlm_kernels.reference.select_tokens import select_tokens as _reference


def select_tokens(
    scores: Tensor,
    budget: int,
    *,
    seq_lens: Tensor | None = None,
    scatter_ratio: float = 0.0,
    num_buckets: int | None = None,
    bucket_capacity: int = 1,
    buckets: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Selects at most `budget` tokens of each row by score, spread over time as far as `scatter_ratio` asks for.

    Vision Sink Bucketing of LiveVLM (arXiv 2505.15269 v2). First the best `round((1 - scatter_ratio) * budget)` tokens
    are taken wherever they are. Then the others are walked from the highest score down, and one is taken only if its
    bucket holds fewer than `bucket_capacity` taken tokens, those of the first phase included. If all buckets are full
    or empty before the budget is reached, the highest scores among the rest fill it (ours; the paper leaves it open).
    `scatter_ratio=0` is plain top-k; `scatter_ratio=1` with the defaults gives every bucket its best token.

    Scores: higher = keep. `+inf` is always kept: such tokens are taken in the first phase, all of them even if they are
    more than it takes otherwise. `-inf` and NaN are never kept. Of equal scores (0.0 and -0.0 are equal) the lower
    index wins.

    Args:
        scores: `[*, seq_len]`, float32, float16 or bfloat16; compared in float32.
        budget: tokens to keep in each row, 1..seq_len.
        seq_lens: valid tokens of each row, `[*]`, int32 or int64; all of `seq_len` if None. Clamped to 0..seq_len.
        scatter_ratio: share of the budget that is spread over the buckets, 0..1.
        num_buckets: number of buckets, at least 1; `ceil(budget / bucket_capacity)` if None.
        bucket_capacity: tokens that the second phase fills a bucket up to, at least 1.
        buckets: bucket of each token, `[*, seq_len]`, int32, 0..num_buckets - 1, for buckets by timestamp; needs
            `num_buckets`. A token with another value is in no bucket: the walk passes it by. If None, token p of the n
            valid ones is in bucket `floor(p * num_buckets / n)`.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `(indices, counts)`. indices: int32 `[*, budget]`, ascending and unique, -1 after the last kept one. counts:
        int32 `[*]`, tokens kept = min(budget, valid tokens whose score is above -inf).

    Raises:
        ArgumentError: a shape, dtype, device or value is not allowed.
        BackendError: the backend asked for is not available.
    """
    check.tensor("scores", scores, min_ndim=1)
    check.dtype("scores", scores, check.FLOATS)
    attention.not_empty("scores", scores)
    lead, seq_len = scores.shape[:-1], scores.shape[-1]
    check.between("budget", budget, 1, seq_len)
    check.between("scatter_ratio", scatter_ratio, 0, 1)
    check.at_least("bucket_capacity", bucket_capacity, 1)
    if num_buckets is not None:
        check.at_least("num_buckets", num_buckets, 1)
    elif buckets is None:
        num_buckets = -(-budget // bucket_capacity)
    else:
        raise ArgumentError("buckets was given without num_buckets; their number cannot be read from the tensor")
    flat = scores.reshape(-1, seq_len)
    indices, counts = overload("select_tokens", backend, scores.device)(
        flat,
        check.seq_lens(seq_lens, flat.shape[0], "scores", scores),
        attention.per_token("buckets", buckets, (torch.int32,), "scores", scores, scores.shape),
        budget,
        round((1 - scatter_ratio) * budget),
        num_buckets,
        bucket_capacity,
    )
    return indices.view(*lead, budget), counts.view(lead)


def _fake(
    scores: Tensor,
    seq_lens: Tensor | None,
    buckets: Tensor | None,
    budget: int,
    num_top: int,
    num_buckets: int,
    bucket_capacity: int,
) -> tuple[Tensor, Tensor]:
    batch = scores.shape[0]
    return scores.new_empty((batch, budget), dtype=torch.int32), scores.new_empty((batch,), dtype=torch.int32)


define(
    "select_tokens",
    "(Tensor scores, Tensor? seq_lens, Tensor? buckets, int budget, int num_top, int num_buckets, "
    "int bucket_capacity) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="livevlm_kernels.triton.select_tokens",
)
