# SPDX-License-Identifier: Apache-2.0
"""`evict_similar` against the rule of InfiniPot-V written as loops, and against the ops it fuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kit
from livevlm_kernels import ArgumentError, BackendError, compact_tokens, evict_similar, score_redundancy, select_tokens

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("evict_similar"))

# lead, num_frames, tokens_per_frame, num_kv_heads, head_dim, num_recent_frames, budget
CASES = [
    pytest.param((2,), 6, 196, 4, 128, 2, 700, id="7B"),
    pytest.param((2, 3), 8, 25, 2, 64, 2, 120, id="0.5B"),
    pytest.param((), 1, 1, 1, 1, 1, 1, id="ones"),
    pytest.param((3,), 7, 11, 3, 17, 1, 53, id="odd"),
]


def inputs(lead, frames, tokens, heads, head_dim, device, dtype=torch.float32):
    k, v = torch.randn(2, *lead, frames * tokens, heads, head_dim, device=device).to(dtype).unbind(0)
    slots = torch.arange(tokens, dtype=torch.int32, device=device).repeat(frames).expand(*lead, -1)
    return k.contiguous(), v.contiguous(), slots.clone()


def scores(k, v, slots, recent, tokens):
    """Mean cosine and value norm of one sequence, [H, L] each, float64."""
    frames = k[-recent * tokens :].unflatten(0, (recent, tokens)).double()
    similarity = torch.zeros(k.shape[1], k.shape[0], dtype=torch.float64, device=k.device)
    for token, slot in enumerate(slots.tolist()):
        if 0 <= slot < tokens:
            similarity[:, token] = F.cosine_similarity(k[token].double(), frames[:, slot], dim=-1).mean(0)
    return similarity, v.double().norm(dim=-1).T


def chosen(similarity, norm, budget, recent_tokens, alpha):
    """Indices kept of one sequence."""
    past = len(similarity) - recent_tokens
    rest = budget - recent_tokens
    by_similarity = sorted(range(past), key=lambda i: similarity[i])
    kept = set(by_similarity[: round(alpha * rest)])
    by_norm = sorted((i for i in range(past) if i not in kept), key=lambda i: -norm[i])
    kept |= set(by_norm[: rest - len(kept)])
    return sorted(kept) + list(range(past, len(similarity)))


def expect_moved(after, before, indices):
    """`after` is `before` with the tokens `indices` at the front, and the rest untouched; [B, L, H, D]."""
    for x, y, row in zip(after, before, indices, strict=True):
        assert torch.equal(x[: len(row)], y[row.long()])
        assert torch.equal(x[len(row) :], y[len(row) :])


@each_backend
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("lead", "frames", "tokens", "heads", "head_dim", "recent", "budget"), CASES)
def test_matches_the_rule(lead, frames, tokens, heads, head_dim, recent, budget, alpha, backend, device):
    k, v, slots = inputs(lead, frames, tokens, heads, head_dim, device)
    before = k.clone(), v.clone()
    indices, counts = evict_similar(
        k, v, slots, budget, num_recent_frames=recent, tokens_per_frame=tokens, alpha=alpha, backend=backend
    )
    assert indices.shape == (*lead, budget) and counts.shape == lead and (counts == budget).all()
    flat = [x.reshape(-1, frames * tokens, heads, head_dim) for x in (*before, k, v)]
    rows = indices.reshape(-1, budget)
    for b, row in enumerate(rows.tolist()):
        similarity, norm = scores(flat[0][b], flat[1][b], slots.reshape(-1, frames * tokens)[b], recent, tokens)
        assert row == chosen(similarity.mean(0).tolist(), norm.mean(0).tolist(), budget, recent * tokens, alpha)
    expect_moved(flat[2], flat[0], rows)
    expect_moved(flat[3], flat[1], rows)


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_equals_the_ops_it_fuses(dtype, backend, device):
    k, v, slots = inputs((4,), 6, 20, 2, 64, device, dtype)
    slots[:, 3::17] = -1
    mine, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    indices, _ = evict_similar(*mine, slots, 70, num_recent_frames=2, tokens_per_frame=20, alpha=0.4, backend=backend)

    recent_k = k[:, 80:].unflatten(1, (2, 20))
    similarity, norm = score_redundancy(k, v, recent_k, slots, per_head=False, backend="reference")
    similarity[:, 80:] = torch.inf
    dissimilar, _ = select_tokens(-similarity, 12, backend="reference")
    norm[:, 80:] = torch.inf
    norm.scatter_(1, dissimilar.long(), torch.inf)
    kept, _ = select_tokens(norm, 70, backend="reference")
    compact_tokens(theirs, kept, backend="reference")
    assert torch.equal(indices, kept)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


@each_backend
def test_per_head(backend, device):
    k, v, slots = inputs((2,), 5, 12, 3, 16, device)
    before = k.clone(), v.clone()
    indices, counts = evict_similar(
        k, v, slots, 35, num_recent_frames=1, tokens_per_frame=12, per_head=True, backend=backend
    )
    assert indices.shape == (2, 3, 35) and counts.tolist() == [[35] * 3] * 2
    for b in range(2):
        similarity, norm = scores(before[0][b], before[1][b], slots[b], 1, 12)
        for h in range(3):
            assert indices[b, h].tolist() == chosen(similarity[h].tolist(), norm[h].tolist(), 35, 12, 0.5)
    for after, x in zip((k, v), before, strict=True):
        expect_moved(after.transpose(1, 2).flatten(0, 1), x.transpose(1, 2).flatten(0, 1), indices.flatten(0, 1))


@each_backend
def test_shared_by_all_layers(backend, device):
    k, v, slots = inputs((2, 4), 5, 12, 2, 16, device)
    v[:, 3] *= 1000  # values grow with depth; a deep layer must not decide alone
    before = k.clone(), v.clone()
    indices, counts = evict_similar(
        k, v, slots, 35, num_recent_frames=1, tokens_per_frame=12, shared=True, backend=backend
    )
    assert indices.shape == (2, 4, 35) and counts.shape == (2, 4)
    for b in range(2):
        layers = [scores(before[0][b, i], before[1][b, i], slots[b, i], 1, 12) for i in range(4)]
        similarity = torch.stack([s.mean(0) for s, _ in layers]).mean(0)
        norm = torch.stack([n.mean(0) / n.mean() for _, n in layers]).mean(0)
        expected = chosen(similarity.tolist(), norm.tolist(), 35, 12, 0.5)
        assert indices[b].tolist() == [expected] * 4
    for after, x in zip((k, v), before, strict=True):
        expect_moved(after.flatten(0, 1), x.flatten(0, 1), indices.flatten(0, 1))


@each_backend
def test_a_new_object_survives_a_still_background(backend, device):
    k, v, slots = inputs((1,), 4, 9, 2, 16, device)
    k[:] = k[:, :9].repeat(1, 4, 1, 1)  # every frame the same...
    k[0, 13] = -k[0, 13]  # ...but one patch of the second
    indices, _ = evict_similar(k, v, slots, 10, num_recent_frames=1, tokens_per_frame=9, alpha=1.0, backend=backend)
    assert indices[0].tolist() == [13, *range(27, 36)]


@each_backend
def test_budget_of_everything_and_of_the_recent_frames(backend, device):
    k, v, slots = inputs((2,), 3, 5, 2, 8, device)
    before = k.clone(), v.clone()
    options = {"num_recent_frames": 2, "tokens_per_frame": 5, "backend": backend}
    indices, _ = evict_similar(k, v, slots, 15, **options)
    assert indices.tolist() == [list(range(15))] * 2
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])
    indices, _ = evict_similar(k, v, slots, 10, **options)
    assert indices.tolist() == [list(range(5, 15))] * 2
    expect_moved(k, before[0], indices)


@each_backend
@pytest.mark.parametrize("scope", ["layer", "shared", "per_head"])
def test_takes_along_what_is_known_of_tokens(scope, backend, device):
    k, v, slots = inputs((2, 3), 5, 12, 2, 16, device)
    heads = (2,) if scope == "per_head" else ()
    number = torch.arange(60, device=device).view(60, *[1] * len(heads)).expand(2, 3, 60, *heads).clone()
    facts = [number, number.double() / 7, torch.randn(2, 3, 60, *heads, 5, device=device).half()]
    before = [x.clone() for x in facts]
    options = {"num_recent_frames": 1, "tokens_per_frame": 12, "backend": backend}
    options |= {} if scope == "layer" else {scope: True}
    twin = k.clone(), v.clone()
    indices, _ = evict_similar(k, v, slots, 35, tensors=facts, **options)
    assert torch.equal(indices, evict_similar(*twin, slots, 35, **options)[0])
    assert torch.equal(k, twin[0]) and torch.equal(v, twin[1])
    compact_tokens(before, indices, per_head=bool(heads), backend="reference")
    assert all(torch.equal(x, y) for x, y in zip(facts, before, strict=True))


@each_backend
def test_ties_and_nan(backend, device):
    k, v, slots = (torch.ones(1, 40, 2, 8, device=device) for _ in range(3))
    slots = torch.zeros(1, 40, dtype=torch.int32, device=device)
    options = {"num_recent_frames": 4, "tokens_per_frame": 1, "backend": backend}
    indices, _ = evict_similar(k, v, slots, 10, **options)
    assert indices[0].tolist() == [*range(6), *range(36, 40)]
    k[0, :34], v[0, :34] = torch.nan, torch.nan
    indices, counts = evict_similar(k, v, slots, 10, **options)
    assert indices[0].tolist() == [*range(34, 40), -1, -1, -1, -1] and counts.tolist() == [6]


@each_backend
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_layouts(layout, backend, device):
    k, v, slots = inputs((2,), 4, 10, 2, 64, device)
    views = kit.LAYOUTS[layout](k.clone()), kit.LAYOUTS[layout](v.clone())
    options = {"num_recent_frames": 1, "tokens_per_frame": 10, "backend": backend}
    indices, _ = evict_similar(*views, slots, 25, **options)
    expected, _ = evict_similar(k, v, slots, 25, **options)
    assert torch.equal(indices, expected)
    assert torch.equal(views[0], k) and torch.equal(views[1], v)


K, SLOTS = torch.randn(2, 8, 3, 4), torch.zeros(2, 8, dtype=torch.int32)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 3}, r"budget=3 must lie between num_recent_frames \* tokens_per_frame = 4 and seq_len = 8"),
        ({"budget": 9}, r"budget=9 must lie between .* = 4 and seq_len = 8"),
        ({"num_recent_frames": 0}, r"num_recent_frames=0 must be at least 1"),
        ({"tokens_per_frame": 0}, r"tokens_per_frame=0 must be at least 1"),
        ({"num_recent_frames": 5}, r"budget=6 must lie between .* = 10 and seq_len = 8"),
        ({"alpha": -0.1}, r"alpha=-0.1 must lie between 0 and 1"),
        ({"shared": True, "per_head": True}, r"shared=True and per_head=True exclude each other"),
        ({"slots": SLOTS.long()}, r"slots has dtype int64; allowed: int32"),
        ({"slots": SLOTS[:1]}, r"slots must have shape \[\*, seq_len\] = \(2, 8\), not \(1, 8\)"),
        ({"v": K[:, :4]}, r"v must have shape .* = \(2, 8, 3, 4\), not \(2, 4, 3, 4\)"),
        ({"k": K.long()}, r"k has dtype int64; allowed"),
        ({"tensors": K}, r"tensors must be a list of at most 6 torch.Tensors, not tensor"),
        ({"tensors": [SLOTS] * 7}, r"tensors must be a list of at most 6 torch.Tensors"),
        (
            {"tensors": [SLOTS, SLOTS[:, :4]]},
            r"tensors\[1\] must have shape \[\*, seq_len, ...\] = \(2, 8\), not \(2, 4\)",
        ),
        ({"tensors": [SLOTS], "per_head": True}, r"tensors\[0\] must have at least 3 dimensions"),
    ],
)
def test_refuses_and_writes_nothing(change, message, backend, device):
    arguments = {
        "k": K, "v": K.clone(), "slots": SLOTS, "budget": 6, "num_recent_frames": 2, "tokens_per_frame": 2, **change,
    }  # fmt: skip
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    if isinstance(moved.get("tensors"), list):
        moved["tensors"] = [x.to(device) for x in moved["tensors"]]
    before = {name: x.clone() for name, x in moved.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(ArgumentError, match=message):
        evict_similar(**moved, backend=backend)
    assert all(torch.equal(moved[name], x) for name, x in before.items())


def test_shared_needs_layers_and_missing_backend_writes_nothing():
    options = {"num_recent_frames": 2, "tokens_per_frame": 2}
    k, v = K.clone(), K.clone()
    with pytest.raises(ArgumentError, match="shared=True needs a leading dimension of layers; the shape of k is"):
        evict_similar(k[0], v[0], SLOTS[0], 6, shared=True, **options)
    with pytest.raises(BackendError, match="backend='cuda' cannot run evict_similar on cpu tensors"):
        evict_similar(k, v, SLOTS, 6, backend="cuda", **options)
    assert torch.equal(k, K) and torch.equal(v, K)


@each_backend
def test_refuses_expanded_dimensions(backend, device):
    k = K.to(device)
    with pytest.raises(ArgumentError, match=r"v has strides .*: expanded dimensions cannot be written in place"):
        evict_similar(
            k, k[..., :1].expand(k.shape), SLOTS.to(device), 6, num_recent_frames=2, tokens_per_frame=2, backend=backend
        )
    assert torch.equal(k.cpu(), K)
