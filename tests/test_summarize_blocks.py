# SPDX-License-Identifier: Apache-2.0
"""`summarize_blocks`. Also the template for the tests of other ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kit
import livevlm_kernels
from livevlm_kernels import ArgumentError, BackendError, summarize_blocks

OP = "summarize_blocks"
KINDS = ["mean", "minmax"]
each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases(OP))
each_kind = pytest.mark.parametrize("kind", KINDS)

# (k's shape, block_size)
SHAPES = [
    pytest.param((1, 33, 2, 64), 16, id="0.5B"),
    pytest.param((2, 70, 4, 128), 64, id="7B"),
    pytest.param((3, 1, 1, 1), 1, id="ones"),
    pytest.param((2, 19, 3, 61), 7, id="odd"),
    pytest.param((2, 5, 2, 72), 100, id="block_longer_than_sequence"),
    pytest.param((2, 77, 2, 64), 3, id="many_blocks"),
]
if not kit.SLOW:
    SHAPES += [
        pytest.param((4, 6 * 196, 4, 128), 196, id="7B_frames"),
        pytest.param((28, 400, 4, 128), 16, id="7B_layers"),
        pytest.param((1, 40, 9, 256), 16, id="wide_rows"),
    ]


def keys(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def expect(result: Tensor, k: Tensor, kind: str, **arguments: object) -> None:
    expected = summarize_blocks(k, kind=kind, backend="reference", **arguments)
    exact = {"rtol": 0, "atol": 0} if kind == "minmax" else {"rtol": 1e-5, "atol": 1e-6}  # sums: order of additions
    torch.testing.assert_close(result, expected, **exact)


@each_backend
@each_kind
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize(("shape", "block_size"), SHAPES)
def test_matches_reference(shape, block_size, dtype, kind, backend, device):
    k = keys(shape, device, dtype)
    expect(summarize_blocks(k, block_size=block_size, kind=kind, backend=backend), k, kind, block_size=block_size)


@each_backend
def test_mean_is_the_sum_in_token_order(backend, device):
    if backend == "reference":
        pytest.skip("torch's sum has its own order")
    k = keys((2, 32, 2, 64), device, torch.float32)
    total = torch.zeros(2, 2, 2, 64, device=device)
    for token in range(16):
        total += k[:, token::16]
    result = summarize_blocks(k, block_size=16, backend=backend)
    assert torch.equal(result, total / 16)  # to the last bit: so are all such backends equal to each other


@each_backend
@each_kind
@pytest.mark.parametrize("layout", kit.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype, kind, backend, device):
    k = keys((2, 21, 2, 64), device, dtype)
    view = kit.LAYOUTS[layout](k)
    assert torch.equal(
        summarize_blocks(view, block_size=8, kind=kind, backend=backend),
        summarize_blocks(k, block_size=8, kind=kind, backend=backend),
    )


@each_backend
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_strides_past_int32(dim, backend, device):
    k = keys((2, 3, 2, 8), device)
    far = kit.far_apart(k, dim)
    expect(summarize_blocks(far, block_size=2, backend=backend), k, "mean", block_size=2)


@each_backend
@each_kind
@pytest.mark.parametrize("lens_dtype", [torch.int32, torch.int64])
def test_ragged_sequences(lens_dtype, kind, backend, device):
    lens = [0, 1, 15, 16, 17, 39, 40, 99, -3]  # clamped to 0..seq_len
    k = keys((len(lens), 40, 2, 64), device)
    for row, length in enumerate(lens):
        k[row, max(0, length) :] = torch.nan  # slots past the end may hold anything
    seq_lens = torch.tensor(lens, dtype=lens_dtype, device=device)
    result = summarize_blocks(k, block_size=16, kind=kind, seq_lens=seq_lens, backend=backend)
    assert not result.isnan().any()
    assert not result[0].any() and not result[8].any() and not result[1, 1:].any()
    expect(result, k, kind, block_size=16, seq_lens=seq_lens)


@each_backend
@each_kind
def test_nan_inside_a_sequence_is_kept(kind, backend, device):
    k = keys((1, 32, 1, 8), device)
    k[0, 3, 0, 5] = torch.nan
    result = summarize_blocks(k, block_size=16, kind=kind, backend=backend)
    expected = torch.zeros_like(result, dtype=torch.bool)
    expected[0, 0, ..., 5] = True
    assert torch.equal(result.isnan(), expected)


@each_backend
@each_kind
def test_writes_every_element_of_out(kind, backend, device):
    k = keys((2, 37, 2, 64), device)
    fresh = summarize_blocks(k, block_size=16, kind=kind, backend=backend)
    out = torch.full_like(fresh, torch.nan)
    assert summarize_blocks(k, block_size=16, kind=kind, out=out, backend=backend) is out
    assert torch.equal(out, fresh)
    odd = kit.misaligned(torch.zeros_like(fresh))  # out must be contiguous, not aligned
    assert torch.equal(summarize_blocks(k, block_size=16, kind=kind, out=odd, backend=backend), fresh)


@each_backend
@each_kind
def test_first_token_updates_only_changed_blocks(kind, backend, device):
    first = [0, 15, 16, 31, 39, 40, 1000]
    k = keys((len(first), 40, 2, 64), device)
    full = summarize_blocks(k, block_size=16, kind=kind, backend=backend)
    out = torch.full_like(full, 7.0)
    first_token = torch.tensor(first, device=device)
    summarize_blocks(k, block_size=16, kind=kind, first_token=first_token, out=out, backend=backend)
    for row, token in enumerate(first):
        changed = [(block + 1) * 16 > token for block in range(3)]
        for block in range(3):
            assert torch.equal(out[row, block], full[row, block]) if changed[block] else (out[row, block] == 7).all()


@each_backend
def test_appending_in_steps_equals_once(backend, device):
    k = keys((1, 50, 2, 64), device)
    out = torch.full((1, 7, 2, 64), torch.nan, device=device)
    done = 0
    for length in (3, 8, 9, 30, 50):
        one = {"first_token": torch.tensor([done], device=device), "seq_lens": torch.tensor([length], device=device)}
        summarize_blocks(k, block_size=8, out=out, backend=backend, **one)
        done = length
    assert torch.equal(out, summarize_blocks(k, block_size=8, backend=backend))


@each_backend
def test_leading_dimensions_and_strided_lengths(backend, device):
    k = keys((2, 3, 20, 2, 8), device)
    lens = torch.tensor([[5, 0, 20], [1, 2, 3]], device=device).repeat_interleave(2, 1)[:, ::2]
    result = summarize_blocks(k, block_size=8, seq_lens=lens, backend=backend)
    assert result.shape == (2, 3, 3, 2, 8)
    for i in range(2):
        for j in range(3):
            one = summarize_blocks(k[i, j], block_size=8, seq_lens=lens[i, j], backend=backend)
            assert torch.equal(result[i, j], one)  # nothing depends on the batch


@each_backend
@each_kind
def test_opcheck(kind, backend, device):
    k = keys((2, 20, 2, 8), device)
    lens = torch.tensor([20, 3], dtype=torch.int32, device=device)
    shape = (2, 3, 2, 2, 8) if kind == "minmax" else (2, 3, 2, 8)
    op = kit.overload(OP, backend)
    for seq_lens, first_token in ((None, None), (lens, lens)):
        out = torch.zeros(shape, device=device)
        torch.library.opcheck(op, (k, seq_lens, first_token, 8, kind == "minmax", out))


@each_backend
def test_compiles_without_graph_breaks(backend, device):
    if kit.SLOW:
        pytest.skip("not a backend for compiled graphs")

    def doubled(k: Tensor) -> Tensor:
        return summarize_blocks(k * 2, block_size=8, kind="minmax", backend=backend) + 1

    torch._dynamo.reset()
    # inductor, which takes long on a CPU, for the backend that users get; graph capture and aliasing for the others
    full = backend == livevlm_kernels.backends(OP, device)[0]
    compiled = torch.compile(doubled, backend="inductor" if full else "aot_eager", fullgraph=True, dynamic=True)
    for tokens in (20, 33):
        k = keys((2, tokens, 2, 8), device)
        torch.testing.assert_close(compiled(k), doubled(k))


@each_backend
def test_meta_shapes(backend, device):
    k = torch.empty(2, 20, 2, 8, device="meta")
    out = torch.empty(2, 3, 2, 8, device="meta")
    assert kit.overload(OP, backend)(k, None, None, 8, False, out) is None


K = torch.zeros(2, 20, 2, 8)
BAD = {
    "not_a_tensor": ({"k": [1.0]}, "k must be a torch.Tensor, not list"),
    "too_few_dims": ({"k": torch.zeros(2, 8)}, r"k must have at least 3 dimensions; its shape is \(2, 8\)"),
    "dtype": ({"k": K.int()}, "k has dtype int32; allowed: float32, float16, bfloat16"),
    "empty": ({"k": torch.zeros(2, 0, 2, 8)}, "k is empty"),
    "split_batch": ({"k": torch.zeros(2, 4, 20, 2, 8)[:, :3]}, "k: its leading dimensions .* do not collapse"),
    "block_size": ({"block_size": 0}, "block_size=0 must be at least 1"),
    "kind": ({"kind": "max"}, "kind='max' is unknown; allowed: mean, minmax"),
    "lens_type": ({"seq_lens": 3}, "seq_lens must be a torch.Tensor, not int"),
    "lens_count": ({"seq_lens": torch.tensor([1])}, "seq_lens has 1 entries; the leading dimensions of k give 2"),
    "lens_dtype": ({"seq_lens": torch.tensor([1.0, 2.0])}, "seq_lens has dtype float32; allowed: int32, int64"),
    "lens_device": ({"seq_lens": torch.zeros(2, device="meta").int()}, "seq_lens is on meta but k is on cpu"),
    "first_without_out": ({"first_token": torch.tensor([1, 1])}, "first_token was given without out"),
    "first_count": (
        {"first_token": torch.tensor([1]), "out": torch.zeros(2, 3, 2, 8)},
        "first_token has 1 entries",
    ),
    "out_shape": ({"out": torch.zeros(2, 4, 2, 8)}, r"out must have shape .* = \(2, 3, 2, 8\), not \(2, 4, 2, 8\)"),
    "out_dtype": ({"out": torch.zeros(2, 3, 2, 8).half()}, "out has dtype float16; allowed: float32"),
    "out_strides": ({"out": torch.zeros(2, 3, 8, 2).mT}, "out must be contiguous"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad):
    changes, message = BAD[bad]
    with pytest.raises(ArgumentError, match=message):
        summarize_blocks(**({"k": K, "block_size": 8} | changes))


def test_explicit_backend_never_falls_back():
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run summarize_blocks on cpu tensors; available"):
        summarize_blocks(K, block_size=8, backend="cuda")
    with pytest.raises(BackendError, match="backend='fast' is unknown; allowed: auto, cuda"):
        summarize_blocks(K, block_size=8, backend="fast")
    assert livevlm_kernels.backends(OP, "meta") == ("reference",)


on_gpu = pytest.mark.parametrize("backend", [b for b in livevlm_kernels.backends(OP, "cuda") if b != "reference"])


@pytest.mark.cuda
@on_gpu
def test_runs_on_the_current_stream(backend):
    k = torch.zeros(1, 4096, 4, 128, device="cuda")
    summarize_blocks(k, block_size=16, backend=backend)  # Triton compiles on its first call
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds: a launch on another stream would overtake it
        k.fill_(3.0)
        result = summarize_blocks(k, block_size=16, backend=backend)
    side.synchronize()
    assert (result == 3).all()


@pytest.mark.cuda
@on_gpu
def test_replays_in_a_cuda_graph(backend):
    k = keys((2, 100, 4, 128), "cuda")
    seq_lens = torch.tensor([100, 100], dtype=torch.int32, device="cuda")
    out = torch.empty(2, 7, 4, 128, device="cuda")
    summarize_blocks(k, block_size=16, seq_lens=seq_lens, out=out, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        summarize_blocks(k, block_size=16, seq_lens=seq_lens, out=out, backend=backend)
    k.copy_(keys((2, 100, 4, 128), "cuda"))
    seq_lens.copy_(torch.tensor([33, 0]))
    out.fill_(torch.nan)
    graph.replay()
    expect(out, k, "mean", block_size=16, seq_lens=seq_lens)


@pytest.mark.cuda
@on_gpu
@each_kind
def test_repeated_runs_are_equal_to_the_last_bit(kind, backend):
    k = keys((28, 3000, 4, 128), "cuda")
    first = summarize_blocks(k, block_size=196, kind=kind, backend=backend)
    for _ in range(5):
        assert torch.equal(summarize_blocks(k, block_size=196, kind=kind, backend=backend), first)
    alone = summarize_blocks(k[5], block_size=196, kind=kind, backend=backend)
    assert torch.equal(alone, first[5])
