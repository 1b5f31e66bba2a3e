# SPDX-License-Identifier: Apache-2.0
"""`score_novelty` against distances taken one by one."""

from __future__ import annotations

import pytest
import torch

import kit
from livevlm_kernels import ArgumentError, score_novelty
from livevlm_kernels.reference import _chunks

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("score_novelty"))

# batch, seq_len, num_kv_heads, head_dim, tokens_per_frame
SHAPES = [
    pytest.param((2, 588, 4, 128, 196), id="7B"),
    pytest.param((2, 200, 2, 64, 49), id="0.5B"),
    pytest.param((1, 1, 1, 1, 1), id="ones"),
    pytest.param((3, 31, 3, 17, 7), id="odd"),
    pytest.param((1, 70, 5, 24, 60), id="many slots"),
]


def inputs(shape, device, dtype=torch.float32):
    """A `previous` need not be of the same slot, nor earlier; a tenth of the tokens have none, and a tenth no slot."""
    batch, seq_len, heads, head_dim, tokens = shape
    x = torch.randn(batch, seq_len, heads, head_dim).to(dtype)
    usual = torch.randn(batch, tokens, heads, head_dim)
    slots = torch.randint(-(tokens // 9), tokens + tokens // 9, (batch, seq_len), dtype=torch.int32)
    previous = torch.randint(-(seq_len // 9), seq_len + seq_len // 9, (batch, seq_len), dtype=torch.int32)
    return [tensor.to(device) for tensor in (x, usual, slots, previous)]


def naive(x, usual, slots, previous, lens=None):
    change, step = torch.zeros(2, *x.shape[:2], dtype=torch.float64)
    for b in range(x.shape[0]):
        length = x.shape[1] if lens is None else lens[b]
        for token in range(length):
            slot, before = int(slots[b, token]), int(previous[b, token])
            own = x[b, token].double()
            change[b, token] = (own - usual[b, slot]).norm() if 0 <= slot < usual.shape[1] else torch.inf
            step[b, token] = (own - x[b, before].double()).norm() if 0 <= before < length else torch.inf
    return change, step


def close(results, expected):
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_distances(shape, dtype, backend, device):
    arguments = inputs(shape, device, dtype)
    close(score_novelty(*arguments, backend=backend), naive(*arguments))


@each_backend
def test_no_slot_and_no_previous(backend, device):
    x, usual, slots, previous = inputs((1, 40, 2, 8, 5), device)
    slots[:], previous[:] = 3, 7
    slots[0, ::4] = torch.tensor([-1, 5, 2**31 - 1, -(2**31), 6], dtype=torch.int32).repeat(2)
    previous[0, 1::4] = torch.tensor([-1, 40, 2**31 - 1, -(2**31), 41], dtype=torch.int32).repeat(2)
    change, step = score_novelty(x, usual, slots, previous, backend=backend)
    token = torch.arange(40, device=device)
    assert torch.equal(change[0].isinf(), token % 4 == 0) and torch.equal(step[0].isinf(), token % 4 == 1)
    assert step[0, 7] == 0  # itself
    close((change, step), naive(x, usual, slots, previous))


@each_backend
def test_ragged_sequences_over_garbage(backend, device):
    lens = [0, 1, 30, 31, 40]  # the last is longer than there are tokens
    x, usual, slots, previous = inputs((5, 31, 2, 16, 7), device)
    previous[2, :5], previous[2, 5:8] = 30, 29  # beyond the end, and the last one
    for row, length in enumerate(lens):
        x[row, length:], slots[row, length:], previous[row, length:] = torch.nan, 1, 0
    usual[0] = usual[:, 6] = torch.nan
    slots[slots == 6] = 5
    results = score_novelty(x, usual, slots, previous, seq_lens=torch.tensor(lens, device=device), backend=backend)
    close(results, naive(x, usual, slots, previous, [min(length, 31) for length in lens]))


@each_backend
def test_small_distances_of_long_vectors(backend, device):
    """Squares of 1000 would leave nothing of a difference of a thousandth."""
    x, usual, slots, previous = inputs((1, 20, 2, 64, 4), device)
    x[:], usual[:], slots[:], previous[:] = 1000.0, 1000.0, 2, 0
    x[0, 5:, 1, 3] += 2**-10
    change, step = score_novelty(x, usual, slots, previous, backend=backend)
    expected = torch.zeros(1, 20)
    expected[0, 5:] = 2**-10
    close((change, step), (expected.double(), expected.double()))


@each_backend
@pytest.mark.parametrize("slots_left", [1, 40], ids=["one slot", "all slots"])
def test_longer_than_a_block_looks_at(slots_left, backend, device):
    """The CUDA kernel looks for the tokens of its slots among 4096 at a time."""
    x, usual, slots, previous = inputs((1, 9_000, 1, 8, 40), device)
    slots = torch.where(slots >= 0, slots % slots_left, slots)
    arguments = x, usual, slots, previous
    expected = score_novelty(*arguments, backend="reference")
    torch.testing.assert_close(score_novelty(*arguments, backend=backend), expected)


@each_backend
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_layouts_and_leading_dimensions(layout, backend, device):
    x, usual, slots, previous = inputs((6, 20, 2, 64, 9), device)
    change = kit.LAYOUTS[layout]
    expected = score_novelty(x, usual, slots, previous, backend=backend)
    torch.testing.assert_close(score_novelty(change(x), usual, slots, previous, backend=backend), expected)
    torch.testing.assert_close(score_novelty(x, change(usual), slots, previous, backend=backend), expected)
    stacked = [tensor.unflatten(0, (2, 3)) for tensor in (x, usual, slots, previous)]
    for result, flat in zip(score_novelty(*stacked, backend=backend), expected, strict=True):
        assert torch.equal(result.flatten(0, 1), flat)


@pytest.mark.parametrize("most", [1, 300, 2_000])
def test_chunks_do_not_change_the_reference(most, monkeypatch):
    arguments = inputs((5, 20, 2, 8, 7), "cpu")
    lens = torch.tensor([3, 20, 0, 11, 17])
    expected = score_novelty(*arguments, seq_lens=lens, backend="reference")
    monkeypatch.setattr(_chunks, "MAX_ELEMENTS", most)
    torch.testing.assert_close(score_novelty(*arguments, seq_lens=lens, backend="reference"), expected)


X, USUAL, SLOTS = torch.randn(2, 8, 3, 4), torch.randn(2, 5, 3, 4), torch.zeros(2, 8, dtype=torch.int32)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.long()}, r"x has dtype int64; allowed: float32, float16, bfloat16"),
        ({"x": X[:, :0]}, r"x is empty"),
        ({"usual": USUAL.half()}, r"usual has dtype float16; allowed: float32"),
        ({"usual": USUAL[0]}, r"usual must have shape .* = \(2, 5, 3, 4\), not \(5, 3, 4\)"),
        ({"usual": USUAL[..., :2, :]}, r"usual must have shape .* = \(2, 5, 3, 4\), not \(2, 5, 2, 4\)"),
        ({"usual": USUAL[:, :0]}, r"usual is empty"),
        ({"slots": SLOTS.long()}, r"slots has dtype int64; allowed: int32"),
        ({"slots": None}, r"slots must be a torch.Tensor, not NoneType"),
        ({"previous": SLOTS[0]}, r"previous must have shape \[\*, seq_len\] = \(2, 8\), not \(8,\)"),
        ({"previous": None}, r"previous must be a torch.Tensor, not NoneType"),
        ({"seq_lens": SLOTS}, r"seq_lens has 16 entries; the leading dimensions of x give 2"),
    ],
)
def test_refuses(change, message, backend, device):
    arguments = {"x": X, "usual": USUAL, "slots": SLOTS, "previous": SLOTS, **change}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ArgumentError, match=message):
        score_novelty(**moved, backend=backend)
