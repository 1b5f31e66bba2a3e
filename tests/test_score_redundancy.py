# SPDX-License-Identifier: Apache-2.0
"""`score_redundancy` against cosines taken one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kit
from livevlm_kernels import ArgumentError, score_redundancy
from livevlm_kernels.reference import _chunks

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("score_redundancy"))

# batch, seq_len, num_kv_heads, head_dim, num_recent_frames, tokens_per_frame
SHAPES = [
    pytest.param((1, 392, 4, 128, 2, 196), id="7B"),
    pytest.param((2, 200, 2, 64, 3, 49), id="0.5B"),
    pytest.param((1, 1, 1, 1, 1, 1), id="ones"),
    pytest.param((3, 31, 3, 17, 5, 7), id="odd"),
]


def inputs(shape, device, dtype=torch.float32):
    batch, seq_len, heads, head_dim, frames, tokens = shape
    k, v = torch.randn(2, batch, seq_len, heads, head_dim, device=device).to(dtype).unbind(0)
    recent_k = torch.randn(batch, frames, tokens, heads, head_dim, device=device).to(dtype)
    slots = torch.randint(0, tokens, (batch, seq_len), dtype=torch.int32, device=device)
    return k, v, recent_k, slots


def naive(k, v, recent_k, slots, lens=None):
    similarity = torch.zeros(k.shape[0], k.shape[2], k.shape[1], dtype=torch.float64, device=k.device)
    value_norm = torch.zeros_like(similarity)
    for b in range(k.shape[0]):
        for token in range(k.shape[1] if lens is None else lens[b]):
            value_norm[b, :, token] = v[b, token].double().norm(dim=-1)
            slot = int(slots[b, token])
            if 0 <= slot < recent_k.shape[2]:
                cosine = F.cosine_similarity(k[b, token].double(), recent_k[b, :, slot].double(), dim=-1)  # [F, H]
                similarity[b, :, token] = cosine.mean(0)
    return similarity, value_norm


def close(results, expected):
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_cosines(shape, dtype, backend, device):
    arguments = inputs(shape, device, dtype)
    expected = naive(*arguments)
    close(score_redundancy(*arguments, backend=backend), expected)
    close(score_redundancy(*arguments, per_head=False, backend=backend), [x.mean(1) for x in expected])


@each_backend
def test_slots_outside_have_no_similarity(backend, device):
    k, v, recent_k, slots = inputs((1, 40, 2, 8, 2, 5), device)
    slots[0, ::4] = torch.tensor([-1, 5, 2**31 - 1, -(2**31), 6], device=device, dtype=torch.int32).repeat(2)
    similarity, value_norm = score_redundancy(k, v, recent_k, slots, backend=backend)
    assert not similarity[..., ::4].any() and (value_norm > 0).all()
    close((similarity, value_norm), naive(k, v, recent_k, slots))


@each_backend
def test_ragged_sequences_over_garbage(backend, device):
    lens = [0, 1, 30, 31]
    k, v, recent_k, slots = inputs((4, 31, 2, 16, 2, 7), device)
    for row, length in enumerate(lens):
        k[row, length:], v[row, length:], slots[row, length:] = torch.nan, torch.inf, 1 << 30
    for per_head in (True, False):
        results = score_redundancy(
            k, v, recent_k, slots, seq_lens=torch.tensor(lens, device=device), per_head=per_head, backend=backend
        )
        expected = naive(k, v, recent_k, slots, lens)
        close(results, expected if per_head else [x.mean(1) for x in expected])


@each_backend
def test_a_still_scene_and_zero_keys(backend, device):
    k, v, recent_k, _ = inputs((1, 12, 2, 16, 3, 4), device)
    recent_k[:] = recent_k[:, :1]
    k = recent_k[:, 0].repeat(1, 3, 1, 1) * torch.rand(1, 12, 1, 1, device=device)  # lengths do not matter
    slots = torch.arange(4, device=device, dtype=torch.int32).repeat(3)[None]
    similarity, _ = score_redundancy(k, v, recent_k, slots, backend=backend)
    torch.testing.assert_close(similarity, torch.ones_like(similarity))
    opposite, _ = score_redundancy(-k, v, recent_k, slots, backend=backend)
    torch.testing.assert_close(opposite, -similarity)
    k[:, 5], recent_k[:, :, 2] = 0, 0
    similarity, _ = score_redundancy(k, v, recent_k, slots, backend=backend)
    assert not similarity[..., [2, 5, 6, 10]].any() and similarity.isfinite().all()


@each_backend
@pytest.mark.parametrize("frames", [1, 2])
def test_keys_too_long_to_square(frames, backend, device):
    """Where the square of a length overflows, the length is infinite, and cosines are 0 unless an element is."""
    k, v, recent_k, slots = inputs((1, 12, 3, 64, frames, 4), device, torch.bfloat16)
    similarity, _ = score_redundancy(k * 1e25, v, recent_k * 1e25, slots, backend=backend)
    assert not similarity.any()
    k[0, 5, 1, 7] = torch.inf
    similarity, _ = score_redundancy(k * 1e25, v, recent_k, slots, backend=backend)
    assert similarity[0, 1, 5].isnan() and similarity.isnan().sum() == 1


@each_backend
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_layouts_and_leading_dimensions(layout, backend, device):
    k, v, recent_k, slots = inputs((6, 20, 2, 64, 2, 9), device)
    change = kit.LAYOUTS[layout]
    expected = score_redundancy(k, v, recent_k, slots, backend=backend)
    torch.testing.assert_close(score_redundancy(change(k), change(v), recent_k, slots, backend=backend), expected)
    stacked = [x.unflatten(0, (2, 3)) for x in (k, v, recent_k, slots)]
    for result, flat in zip(score_redundancy(*stacked, backend=backend), expected, strict=True):
        assert torch.equal(result.flatten(0, 1), flat)


@each_backend
def test_recent_frames_inside_the_cache(backend, device):
    k, v, _, _ = inputs((3, 40, 2, 16, 1, 1), device)
    slots = torch.arange(10, dtype=torch.int32, device=device).repeat(3, 4)
    view = k[:, 20:].unflatten(1, (2, 10))  # not contiguous
    close(score_redundancy(k, v, view, slots, backend=backend), naive(k, v, view, slots))


@pytest.mark.parametrize("most", [1, 300, 2_000])
def test_chunks_do_not_change_the_reference(most, monkeypatch):
    arguments = inputs((5, 20, 2, 8, 2, 7), "cpu")
    expected = score_redundancy(*arguments, backend="reference")
    monkeypatch.setattr(_chunks, "MAX_ELEMENTS", most)
    torch.testing.assert_close(score_redundancy(*arguments, backend="reference"), expected)


K, RECENT, SLOTS = torch.randn(2, 8, 3, 4), torch.randn(2, 1, 5, 3, 4), torch.zeros(2, 8, dtype=torch.int32)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": K.long()}, r"k has dtype int64; allowed: float32, float16, bfloat16"),
        (
            {"v": K[:, :7]},
            r"v must have shape \[\*, seq_len, num_kv_heads, head_dim\] = \(2, 8, 3, 4\), not \(2, 7, 3, 4\)",
        ),
        ({"v": K.half()}, r"v has dtype float16; allowed: float32"),
        ({"recent_k": RECENT[0]}, r"recent_k must have shape .* = \(2, 1, 5, 3, 4\), not \(1, 5, 3, 4\)"),
        ({"recent_k": RECENT[:, 0, 0]}, r"recent_k must have at least 4 dimensions; its shape is \(2, 3, 4\)"),
        ({"recent_k": RECENT[:, :0]}, r"recent_k is empty"),
        ({"recent_k": RECENT[..., :2, :]}, r"recent_k must have shape .* = \(2, 1, 5, 3, 4\), not \(2, 1, 5, 2, 4\)"),
        ({"slots": SLOTS.long()}, r"slots has dtype int64; allowed: int32"),
        ({"slots": SLOTS[0]}, r"slots must have shape \[\*, seq_len\] = \(2, 8\), not \(8,\)"),
        ({"slots": None}, r"slots must be a torch.Tensor, not NoneType"),
        ({"seq_lens": SLOTS}, r"seq_lens has 16 entries; the leading dimensions of k give 2"),
    ],
)
def test_refuses(change, message, backend, device):
    arguments = {"k": K, "v": K, "recent_k": RECENT, "slots": SLOTS, **change}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ArgumentError, match=message):
        score_redundancy(**moved, backend=backend)
