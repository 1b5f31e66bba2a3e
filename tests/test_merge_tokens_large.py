# SPDX-License-Identifier: Apache-2.0
"""`merge_tokens` on sequences of many tiles, and where its kernels change their way of working."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import kit
import livevlm_kernels
from livevlm_kernels import merge_tokens

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("merge_tokens"))
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
STREAMS = 20 if kit.SLOW else 120

# lengths of the sequences, num_kv_heads, head_dim
SHAPES = [
    pytest.param((90, 0, 67), 2, 64, id="0.5B"),
    pytest.param((81,), 3, 24, id="odd"),
]
if not kit.INTERPRETED:
    SHAPES += [
        pytest.param((301, 257), 4, 128, id="7B"),
        pytest.param((700, 0, 333), 2, 64, id="0.5B_long"),
        pytest.param((900,), 3, 24, id="odd_long"),
        pytest.param((1700, *[0] * STREAMS, 1501), 1, 64, id="many_streams"),
        pytest.param((1700, *[0] * STREAMS, 1501), 1, 80, id="many_streams_80"),
        pytest.param((2500, 1), 2, 64, id="many_parts"),
        pytest.param((1300, 1299), 1, 32, id="short_keys"),
        pytest.param((333, 129), 5, 128, id="long_keys"),
        pytest.param((333, 129), 6, 128, id="longer_keys"),
    ]


@each_backend
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize(("lens", "heads", "dim"), SHAPES)
def test_each_orphan_finds_its_partner(lens, heads, dim, dtype, backend, device):
    seq_len = max(lens)
    num_rows = seq_len // 2
    k, v = torch.randn(2, len(lens), seq_len, heads, dim)
    indices = torch.full((len(lens), num_rows), -1, dtype=torch.int32)
    groups = torch.full((len(lens), seq_len), -1, dtype=torch.int32)
    for b, length in enumerate(lens):
        shuffled = torch.randperm(length)
        rows = torch.randperm(num_rows)[: (length + 1) // 2].sort().values  # padding anywhere
        survivors = shuffled[: len(rows)].sort().values
        indices[b, rows] = survivors.int()
        groups[b, survivors] = rows.int()
        if len(orphans := shuffled[len(rows) :]):
            partner = torch.randint(len(rows), (len(orphans),))
            k[b, orphans] = k[b, orphans] * 0.4 + k[b, survivors[partner]]
            groups[b, orphans] = rows[partner].int()
        k[b, length:] = torch.nan
    k, v, indices, groups = k.to(device, dtype), v.to(device, dtype), indices.to(device), groups.to(device)
    options = {"seq_lens": torch.tensor(lens, device=device), "backend": backend}
    found = merge_tokens(k, v, indices=indices, **options)
    known = merge_tokens(k, v, groups=groups, num_groups=num_rows, **options)
    assert all(torch.equal(x, y) for x, y in zip(found, known, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif("cuda" not in livevlm_kernels.backends("merge_tokens", "cuda"), reason="built without CUDA kernels")
def test_tensor_cores_without_warpgroup_products():
    """What GPUs before Hopper run; on Hopper only when asked for, so in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "cuda-cuda and (each_orphan or equal_survivors or nan_keys)"]
    subprocess.run(command, check=True, env=os.environ | {"LIVEVLM_NEAREST": "mma"})


@each_backend
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_of_equal_survivors_the_first_takes_all(dtype, backend, device):
    if backend == "reference":
        return  # torch's matrix product may round equal columns differently
    distinct, num_rows, seq_len = (7, 40, 60) if kit.INTERPRETED else (90, 450, 800)
    k, v = torch.randint(-2, 3, (2, 1, seq_len, 2, 64)).float()  # whole numbers: products are exact in any order
    k[:, :num_rows] = k[:, :distinct].repeat(1, num_rows // distinct + 1, 1, 1)[:, :num_rows]
    indices = torch.arange(num_rows, dtype=torch.int32)[None]
    k, v, indices = k.to(device, dtype), v.to(device, dtype), indices.to(device)
    _, _, sizes = merge_tokens(k, v, indices=indices, backend=backend)
    assert (sizes[0, distinct:] == 1).all() and sizes.sum() == seq_len


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(4, 128), (2, 64), (1, 8), (3, 17)])
def test_few_long_groups(heads, dim, dtype, backend, device):
    seq_len, length = (100, 57) if kit.INTERPRETED else (5000, 4097)
    k, v = torch.randn(2, 2, seq_len, heads, dim, device=device).to(dtype)
    groups = torch.randint(-1, 4, (2, seq_len), dtype=torch.int32, device=device)
    weights = torch.rand(2, seq_len, device=device)
    options = {"num_groups": 3, "groups": groups, "weights": weights}
    lens = torch.tensor([length, seq_len], device=device)
    both = merge_tokens(k, v, **options, seq_lens=lens, backend=backend)
    expected = merge_tokens(k, v, **options, seq_lens=lens, backend="reference")
    for x, y in zip(both, expected, strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=1e-2 if x.itemsize == 2 else 1e-4, atol=1e-3)
    if backend == "reference":
        return  # torch's own kernels choose by the shape of the batch
    options = {"num_groups": 3, "groups": groups[:1, :length], "weights": weights[:1, :length]}
    alone = merge_tokens(k[:1, :length], v[:1, :length], **options, backend=backend)
    assert all(torch.equal(x[0], y[0]) for x, y in zip(alone, both, strict=True))


@each_backend
@pytest.mark.parametrize("num_groups", [48, 49, 4000])
def test_many_groups_of_which_most_are_empty(num_groups, backend, device):
    if kit.INTERPRETED:
        num_groups = min(num_groups, 100)
    k, v = torch.randn(2, 2, 700, 2, 8, device=device)
    groups = torch.randint(-1, num_groups + 1, (2, 700), dtype=torch.int32, device=device) // 7 * 7
    weights, lens = torch.rand(2, 700, device=device), torch.tensor([700, 577], device=device)
    options = {"groups": groups, "num_groups": num_groups, "weights": weights, "seq_lens": lens}
    results = (merge_tokens(k, v, **options, backend=b) for b in (backend, "reference"))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@each_backend
@pytest.mark.parametrize("dtype", kit.DTYPES)
def test_nan_keys_lose_no_token(dtype, backend, device):
    k = torch.randn(1, 40, 2, 64, device=device).to(dtype)
    v = torch.ones_like(k)
    k[0, [3, 7]] = torch.nan  # a survivor and an orphan
    indices = torch.tensor([[-1, 3, 5, 6]], dtype=torch.int32, device=device)
    _, v_out, sizes = merge_tokens(k, v, indices=indices, backend=backend)
    assert sizes.sum() == 40 and sizes[0, 0] == 0 and sizes[0, 1] >= 2  # the orphan goes to the lowest valid row
    assert torch.equal(v_out[0, 1:], v[0, :3]) and not v_out[0, 0].any()
