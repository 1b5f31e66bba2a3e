# SPDX-License-Identifier: Apache-2.0
"""All backends agree at the sizes of a 7B model: scores closely, choices up to ties within the error of scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kit
from livevlm_kernels import evict_similar, merge_tokens, score_redundancy, score_tokens, select_tokens

FRAMES, RECENT = 8, 2
ERROR = 2e-6  # of a cosine, and relative of a norm, in float32
SIZES = {"cuda": (28, 196, 4, 128), "cpu": (2, 13, 2, 32) if kit.SLOW else (3, 49, 4, 128)}  # layers, frame, heads, dim


def each_backend(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("backend", "device"), [c for c in kit.cases(op) if c.values[0] != "reference"])


def video(device: str, still: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and slots of eight frames; of a still scene, frames differ by little more than rounding."""
    layers, patches, heads, dim = SIZES[device]
    k, v = torch.randn(2, layers, FRAMES, patches, heads, dim, device=device)
    if still:
        k, v = (x[:, :1] + 0.02 * x for x in (k, v))
    slots = torch.arange(patches, dtype=torch.int32, device=device).repeat(layers, FRAMES)
    return k.bfloat16().flatten(1, 2), v.bfloat16().flatten(1, 2), slots


@each_backend("score_tokens")
@pytest.mark.parametrize("reduction", ["kv_head", "layer", "shared"])
def test_score_tokens(reduction, backend, device):
    k, _, _ = video(device)
    q = torch.randn(len(k), 16, 7 * k.shape[2], k.shape[3], device=device).bfloat16()
    result, expected = (score_tokens(q, k, reduction=reduction, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-7)


@each_backend("score_redundancy")
@pytest.mark.parametrize("per_head", [True, False])
def test_score_redundancy(per_head, backend, device):
    k, v, slots = video(device)
    recent_k = k.unflatten(1, (FRAMES, -1))[:, -RECENT:]
    for x, y in zip(
        *(score_redundancy(k, v, recent_k, slots, per_head=per_head, backend=b) for b in (backend, "reference")),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@each_backend("select_tokens")
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_select_tokens_from_equal_scores(ratio, backend, device):
    _, v, _ = video(device)
    scores = v.float().norm(dim=-1).mean(-1)
    for dtype in kit.DTYPES:
        budget = scores.shape[1] // 2
        results = (
            select_tokens(scores.to(dtype), budget, scatter_ratio=ratio, backend=b) for b in (backend, "reference")
        )
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)


def expect_choice(kept: Tensor, similarity: Tensor, norm: Tensor, num_dissimilar: int) -> None:
    """Whether `kept`, of the past tokens [L], is a choice that scores off by no more than ERROR may lead to."""
    last = similarity.sort().values[num_dissimilar - 1] if num_dissimilar else -torch.inf
    assert kept[similarity < last - ERROR].all(), "a token with a lower similarity than others was lost"
    by_norm = kept & (similarity > last + ERROR)
    if by_norm.any() and not kept.all():
        assert norm[by_norm].min() >= norm[~kept].max() * (1 - ERROR), "a token with a larger value was lost"


def expect_eviction(k: Tensor, v: Tensor, slots: Tensor, patches: int, budget: int, backend: str, **sharing) -> None:
    before = k.clone(), v.clone()
    length = k.shape[1]
    past = length - RECENT * patches
    options = {"num_recent_frames": RECENT, "tokens_per_frame": patches, **sharing}
    indices, counts = evict_similar(k, v, slots, budget, backend=backend, **options)
    assert (counts == budget).all()

    recent_k = before[0].unflatten(1, (-1, patches))[:, -RECENT:]
    similarity, norm = score_redundancy(*before, recent_k, slots, per_head="per_head" in sharing, backend="reference")
    if "shared" in sharing:
        similarity, norm = similarity.mean(0, keepdim=True), (norm / norm.mean(-1, keepdim=True)).mean(0, keepdim=True)
        assert (indices == indices[0]).all()
    rows = indices.long().view(-1, budget)[: similarity[..., 0].numel()]
    for row, s, n in zip(rows, similarity.view(-1, length), norm.view(-1, length), strict=True):
        assert (row.diff() > 0).all() and (row[past - length :] >= past).all()
        kept = torch.zeros(length, dtype=torch.bool, device=k.device).index_fill(0, row, True)[:past]
        expect_choice(kept, s[:past], n[:past], round(0.5 * (budget - RECENT * patches)))

    source = indices.long()[..., None] if "per_head" in sharing else indices.long()[:, None, :, None]
    for after, x in zip((k, v), before, strict=True):
        x, after = x.transpose(1, 2), after.transpose(1, 2)  # [layers, heads, tokens, dim]
        moved = x.gather(2, source.expand(*x.shape[:2], budget, x.shape[3]))
        assert torch.equal(after[:, :, :budget], moved) and torch.equal(after[:, :, budget:], x[:, :, budget:])


@each_backend("evict_similar")
@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("sharing", [{}, {"per_head": True}, {"shared": True}], ids=["layer", "head", "all_layers"])
def test_evict_similar(sharing, still, backend, device):
    k, v, slots = video(device, still)
    expect_eviction(k, v, slots, SIZES[device][1], k.shape[1] // 2, backend, **sharing)


@each_backend("evict_similar")
@pytest.mark.parametrize("sharing", [{}, {"per_head": True}], ids=["layer", "head"])
@pytest.mark.parametrize("frames", [82] if kit.INTERPRETED else [81, 82])
def test_evict_similar_around_what_shared_memory_holds(frames, sharing, backend, device):
    """The CUDA kernel keeps the keys of up to 32,768 tokens in shared memory."""
    patches = 400
    k, v = torch.randn(2, 1, frames * patches, 2, 8, device=device)
    slots = torch.arange(patches, dtype=torch.int32, device=device).repeat(1, frames)
    expect_eviction(k, v, slots, patches, 20_000, backend, **sharing)


@each_backend("merge_tokens")
def test_merge_tokens_by_groups(backend, device):
    k, v, slots = video(device)
    weights = torch.rand(slots.shape, device=device)
    frames = (
        torch.arange(FRAMES, dtype=torch.int32, device=device).repeat_interleave(SIZES[device][1]).repeat(len(k), 1)
    )
    for groups, rows in ((frames, FRAMES), (slots, SIZES[device][1])):
        options = {"groups": groups, "num_groups": rows, "weights": weights}
        results = (merge_tokens(k, v, **options, backend=b) for b in (backend, "reference"))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=2**-7 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def rows_of_tokens(k: Tensor, indices: Tensor, backend: str) -> Tensor:
    """The row that every token is merged into. Values say which tokens a row has: bit t // C of channel t % C."""
    length, channels = k.shape[1], k.shape[2] * k.shape[3]
    assert length <= 4 * channels  # more bits would not survive the rounding to bfloat16
    token = torch.arange(length, device=k.device)
    v = torch.zeros(length, channels, dtype=k.dtype, device=k.device)
    v[token, token % channels] = (2.0 ** (token // channels)).to(k.dtype)
    _, v_out, sizes = merge_tokens(k, v.view(k.shape[1:]).repeat(len(k), 1, 1, 1), indices=indices, backend=backend)
    bits = (v_out.flatten(2).float() * sizes[:, :, None]).round().int()
    member = bits[:, :, token % channels] >> (token // channels).int() & 1  # [B, rows, L]
    assert (member.sum(1) == 1).all(), "a token is in no row or in several"
    return member.argmax(1)


@each_backend("merge_tokens")
@pytest.mark.parametrize("still", [False, True])
def test_merge_tokens_by_similarity(still, backend, device):
    k, _, _ = video(device, still)
    length = k.shape[1]
    kept = torch.rand(len(k), length, device=device).argsort(-1)[:, : length // 2].sort(-1).values
    rows, expected = (rows_of_tokens(k, kept.int(), b) for b in (backend, "reference"))
    layer, token = (rows != expected).nonzero(as_tuple=True)
    unit = F.normalize(k.flatten(2).double(), dim=-1)
    mine, theirs = (
        (unit[layer, token] * unit[layer, kept[layer, row[layer, token]]]).sum(-1) for row in (rows, expected)
    )
    assert len(token) <= 0.01 * rows.numel() or still
    assert ((mine - theirs).abs() <= ERROR).all(), "more than a tie within the error of a cosine"
