# SPDX-License-Identifier: Apache-2.0
"""`block_attention` against torch's scaled_dot_product_attention with explicit masks, and its invariants."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kit
from livevlm_kernels import ArgumentError, backends, block_attention, merge_states
from livevlm_kernels.reference import _chunks

each_backend = pytest.mark.parametrize(("backend", "device"), kit.cases("block_attention"))
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# num_blocks, block_size, num_qo_heads, num_kv_heads, head_dim, queries and keys of each sequence
CASES = [
    pytest.param((40, 16, 28, 4, 128), [(1, 300)], id="7B_decode"),
    pytest.param(
        (40, 16, 28, 4, 128),
        [(9, 150), (3, 3), (5, 77)] if kit.SLOW else [(33, 301), (20, 20), (5, 77)],
        id="7B_questions",
    ),
    pytest.param((4, 196, 14, 2, 64), [(74, 484) if kit.SLOW else (392, 784)], id="0.5B_clip"),
    pytest.param((50, 7, 14, 2, 64), [(1, 7), (1, 8), (1, 1), (1, 50)], id="0.5B_decode"),
    # Heads are many, so splits are few: rows for which CUDA kernels make images of their tiles.
    *([] if kit.SLOW else [pytest.param((40, 16, 32, 16, 64), [(300, 450), (5, 77)], id="many_heads")]),
    pytest.param((30, 1, 9, 3, 18), [(2, 13), (3, 7)], id="group_3"),
    pytest.param((9, 5, 3, 3, 6), [(4, 11), (6, 17)], id="group_1"),
    pytest.param((1, 1, 1, 1, 2), [(1, 1)], id="ones"),
]


class Problem:
    """Pools of random blocks, a random table without repeats, and the dense keys of each sequence."""

    def __init__(self, shape, lengths, device, dtype=torch.float32, per_head=False):
        num_blocks, block_size, num_qo_heads, num_kv_heads, head_dim = shape
        self.queries, self.keys = zip(*lengths, strict=True)
        self.q = torch.randn(sum(self.queries), num_qo_heads, head_dim, device=device).to(dtype)
        pools = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim, device=device).to(dtype)
        self.k, self.v = pools.unbind(0)
        counts = [-(-n // block_size) for n in self.keys]
        self.table = kit.block_tables(num_blocks, counts, num_kv_heads if per_head else None).to(device)
        self.seq_lens = torch.tensor(self.keys, dtype=torch.int32, device=device)
        starts = torch.tensor([0, *self.queries]).cumsum(0)
        self.cu_seqlens_q = starts.to(device, torch.int32)

    def run(self, backend, **options):
        q, k, v = options.pop("q", self.q), options.pop("k", self.k), options.pop("v", self.v)
        options.setdefault("cu_seqlens_q", self.cu_seqlens_q)
        return block_attention(q, k, v, self.table, self.seq_lens, return_lse=True, backend=backend, **options)

    def dense(self, pool, row, length):
        """What the table of a sequence names, [H, length, ...]."""
        heads = pool.shape[2]
        table = self.table[row] if self.table.dim() == 3 else self.table[row].expand(heads, -1)
        return torch.stack([pool[table[h].clamp(min=0).long(), :, h].flatten(0, 1)[:length] for h in range(heads)])

    def exact(self, mask_of, scale=None, k=None):
        """SDPA in float64; `mask_of(row, n_q, n_k)` says which keys each query sees, True = seen."""
        outs, lses = [], []
        group = self.q.shape[1] // self.k.shape[2]
        for row, (q, n_k) in enumerate(zip(self.q.split(self.queries), self.keys, strict=True)):
            query = q.transpose(0, 1).double()
            key, value = (
                self.dense(pool, row, n_k).double().repeat_interleave(group, 0)
                for pool in (self.k if k is None else k, self.v)
            )
            mask = mask_of(row, len(q), n_k).to(q.device)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
            logits = query @ key.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
            lse = torch.where(mask, logits, -torch.inf).logsumexp(-1)
            outs.append(torch.where((lse == -torch.inf)[..., None], 0.0, out).transpose(0, 1))
            lses.append(lse.transpose(0, 1))
        return torch.cat(outs), torch.cat(lses)


def tail(row, n_q, n_k):
    """The queries are the last tokens of the sequence."""
    return torch.arange(n_k) <= n_k - n_q + torch.arange(n_q)[:, None]


def everything(row, n_q, n_k):
    return torch.ones(n_q, n_k, dtype=torch.bool)


def close(results, expected, dtype=torch.float32, tolerance=None):
    out, lse = results
    assert out.dtype == dtype and lse.dtype == torch.float32
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    torch.testing.assert_close(out.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-4)


@each_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize(("shape", "lengths"), CASES)
def test_matches_sdpa(shape, lengths, dtype, causal, backend, device):
    problem = Problem(shape, lengths, device, dtype)
    close(problem.run(backend, causal=causal), problem.exact(tail if causal else everything), dtype)


@each_backend
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("shape", "lengths"), CASES)
def test_a_table_per_head(shape, lengths, causal, backend, device):
    problem = Problem(shape, lengths, device, per_head=True)
    close(problem.run(backend, causal=causal), problem.exact(tail if causal else everything))


@each_backend
@pytest.mark.parametrize("window", [1, 2, 16, 50, 1000])
def test_window(window, backend, device):
    problem = Problem((40, 16, 14, 2, 64), [(33, 301), (20, 20), (1, 77)], device)

    def seen(row, n_q, n_k):
        distance = n_k - n_q + torch.arange(n_q)[:, None] - torch.arange(n_k)
        return (distance >= 0) & (distance < window)

    close(problem.run(backend, window=window), problem.exact(seen))


@each_backend
def test_scale_and_equal_lengths_without_offsets(backend, device):
    problem = Problem((40, 16, 14, 2, 64), [(3, 100), (3, 33)], device)
    close(problem.run(backend, sm_scale=0.3), problem.exact(tail, scale=0.3))
    ragged, even = problem.run(backend), problem.run(backend, cu_seqlens_q=None)
    for a, b in zip(ragged, even, strict=True):
        torch.testing.assert_close(a, b)
    out = block_attention(problem.q, problem.k, problem.v, problem.table, problem.seq_lens, backend=backend)
    assert torch.equal(out, even[0])


def rotated(x, positions, angle):
    """RoPE by complex numbers: elements i and i + head_dim / 2 are one number; positions [*x.shape[:-2]]."""
    half = x.shape[-1] // 2
    number = torch.complex(x[..., :half].double(), x[..., half:].double())
    turn = angle[positions.clamp(0, len(angle) - 1).long()].double()
    number = number * torch.polar(torch.ones_like(turn), turn).unsqueeze(-2)
    return torch.cat((number.real, number.imag), -1)


@each_backend
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
def test_rope_at_read(position_dtype, per_head, backend, device):
    problem = Problem((12, 16, 14, 2, 64), [(5, 60), (9, 33)], device, per_head=per_head)
    angle = torch.arange(500, device=device)[:, None] * 10_000 ** -(torch.arange(32, device=device) / 32)
    cache = torch.cat((angle.cos(), angle.sin()), -1).float()
    positions = torch.randint(0, 510, (12, 16), device=device, dtype=position_dtype)  # clamped to 499
    results = problem.run(backend, positions=positions, cos_sin_cache=cache)
    close(results, problem.exact(tail, k=rotated(problem.k, positions, angle)), tolerance=1e-4)


def half_split_angles(num_positions, head_dim, device):
    frequency = 10_000 ** -(torch.arange(head_dim // 2, device=device) / (head_dim // 2))
    angle = torch.arange(num_positions, device=device)[:, None] * frequency
    return angle, torch.cat((angle.cos(), angle.sin()), -1)


@each_backend
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", kit.DTYPES)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("shape", "lengths"), [CASES[0], CASES[3]] if kit.SLOW else CASES[:4])
def test_queries_are_rotated_too(shape, lengths, per_head, dtype, table_dtype, backend, device):
    problem = Problem(shape, lengths, device, dtype, per_head=per_head)
    angle, cache = half_split_angles(1000, shape[-1], device)
    positions = torch.randint(0, 1000, shape[:2], device=device)
    q_positions = torch.randint(0, 1000, (sum(problem.queries),), device=device, dtype=torch.int32)
    results = problem.run(backend, positions=positions, cos_sin_cache=cache.to(table_dtype), q_positions=q_positions)
    turned = Problem.__new__(Problem)
    turned.__dict__ = {**problem.__dict__, "q": rotated(problem.q, q_positions, angle)}
    expected = turned.exact(tail, k=rotated(problem.k, positions, angle))
    coarse = 3e-3 if table_dtype == torch.float16 or dtype != torch.float32 else 2e-4
    torch.testing.assert_close(results[1].double(), expected[1], rtol=10 * coarse, atol=10 * coarse)
    torch.testing.assert_close(results[0].double(), expected[0], rtol=0, atol=max(8 * coarse, TOLERANCE[dtype]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="Hopper only")
def test_tensor_cores_without_warpgroup_products():
    """Other GPUs take this way for many queries; LIVEVLM_ATTENTION is read once, so in a process of its own."""
    selection = "(sdpa or table_per_head or window or rope or rotated or packed or batch) and cuda-cuda or many_keys"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, __file__]
    done = subprocess.run(command, env={**os.environ, "LIVEVLM_ATTENTION": "mma"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@each_backend
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("some_empty", [False, True])
def test_packed_positions_count_keys_in_table_order(some_empty, per_head, backend, device):
    problem = Problem((12, 16, 14, 2, 64), [(5, 60), (9, 33)], device, per_head=per_head)
    angle, cache = half_split_angles(64, 64, device)  # fewer than the table has room for: clamped
    positions = torch.full((12, 16), 7, device=device)
    if some_empty:
        positions[:, 3] = -1
    problem.k[positions < 0] = torch.nan
    q_positions = torch.cat([torch.arange(n - m, n) for m, n in zip(problem.queries, problem.keys, strict=True)])
    q_positions = q_positions.to(device)
    results = problem.run(
        backend, positions=positions if some_empty else None, cos_sin_cache=cache, q_positions=q_positions, packed=True
    )
    turned = Problem.__new__(Problem)
    turned.__dict__ = {**problem.__dict__, "q": rotated(problem.q, q_positions, angle)}
    gone = positions[..., None].expand(-1, -1, 2) < 0

    def dense(pool, row, length):
        content = Problem.dense(problem, pool, row, length)
        if pool is not problem.k:
            return content
        order = torch.arange(length, device=device)
        return rotated(content.nan_to_num()[:, :, None], order.expand(2, -1), angle)[:, :, 0]

    turned.dense = dense
    close(
        results,
        turned.exact(lambda row, n_q, n_k: tail(row, n_q, n_k) & ~Problem.dense(problem, gone, row, n_k)[0].cpu()),
        tolerance=1e-4,
    )


@each_backend
def test_rope_at_read_keeps_relative_positions(backend, device):
    problem = Problem((12, 16, 4, 2, 32), [(1, 60)], device)
    angle = torch.arange(500, device=device)[:, None] * 10_000 ** -(torch.arange(16, device=device) / 16)
    cache = torch.cat((angle.cos(), angle.sin()), -1).float()
    positions = torch.randint(0, 100, (12, 16), device=device)
    outs = []
    for shift in (0, 350):
        query = rotated(problem.q, torch.tensor([100 + shift], device=device), angle).float()
        outs.append(problem.run(backend, q=query, positions=positions + shift, cos_sin_cache=cache)[0])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-4)


@each_backend
@pytest.mark.parametrize("rope", [False, True])
def test_empty_slots(rope, backend, device):
    problem = Problem((12, 8, 6, 2, 16), [(4, 60), (2, 30)], device)
    positions = torch.randint(0, 50, (12, 8), device=device)
    empty = torch.rand(12, 8, device=device) < 0.3
    positions[empty] = -1
    problem.k[empty], problem.v[empty] = torch.nan, torch.inf
    angle = torch.zeros(50, 8, device=device)  # a rotation by nothing
    cache = torch.cat((angle.cos(), angle.sin()), -1) if rope else None
    filled = Problem.__new__(Problem)
    filled.__dict__ = {**problem.__dict__, "k": problem.k.nan_to_num(), "v": problem.v.nan_to_num(posinf=0.0)}
    slots = empty[..., None].expand(-1, -1, 2)

    def seen(row, n_q, n_k):
        return tail(row, n_q, n_k) & ~problem.dense(slots, row, n_k)[0].cpu()

    close(problem.run(backend, positions=positions, cos_sin_cache=cache), filled.exact(seen))


@each_backend
def test_garbage_outside_the_sequences_is_not_read(backend, device):
    problem = Problem((30, 8, 6, 2, 16), [(4, 61), (2, 30)], device)
    expected = problem.exact(tail)
    used = torch.zeros(30, 8, dtype=torch.bool, device=device)
    for row, length in enumerate(problem.keys):
        slots = torch.arange(length, device=device)
        used[problem.table[row, slots // 8].long(), slots % 8] = True
    problem.k[~used], problem.v[~used] = torch.nan, torch.inf
    close(problem.run(backend), expected)
    problem.table[problem.table < 0] = 2**31 - 1  # as good as -1
    close(problem.run(backend), expected)


@each_backend
def test_queries_that_see_nothing(backend, device):
    problem = Problem((30, 8, 6, 2, 16), [(5, 3), (2, 30), (3, 9)], device)
    problem.seq_lens[2] = 0
    out, lse = problem.run(backend)
    assert not out[:2].any() and (lse[:2] == -torch.inf).all()  # five queries, three keys: the first two are too early
    assert lse[2:7].isfinite().all() and out[2:7].any()
    assert not out[7:].any() and (lse[7:] == -torch.inf).all()
    problem.table[:] = -1
    out, lse = problem.run(backend, causal=False)
    assert not out.any() and (lse == -torch.inf).all()


@each_backend
def test_rows_outside_of_all_sequences(backend, device):
    problem = Problem((30, 8, 6, 2, 16), [(5, 13), (2, 30)], device)
    expected = problem.run(backend)
    padded = torch.cat((problem.q, torch.full_like(problem.q[:3], torch.nan)))  # as a CUDA graph of fixed size has it
    out, lse = problem.run(backend, q=padded)
    torch.testing.assert_close(out[:7], expected[0])
    torch.testing.assert_close(lse[:7], expected[1])
    assert not out[7:].any() and (lse[7:] == -torch.inf).all()


@each_backend
def test_a_block_named_twice_counts_twice(backend, device):
    problem = Problem((30, 8, 6, 2, 16), [(2, 16)], device)
    out, lse = problem.run(backend, causal=False)
    problem.table = problem.table[:, :2].repeat(1, 2)
    problem.seq_lens *= 2
    twice = problem.run(backend, causal=False)
    torch.testing.assert_close(twice[0], out)
    torch.testing.assert_close(twice[1], lse + torch.tensor(2.0).log().to(device))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16][: 1 if kit.INTERPRETED else 2])
@pytest.mark.parametrize("rope", [True] if kit.INTERPRETED else [False, True])
def test_a_result_does_not_depend_on_the_batch(rope, dtype, backend, device):
    if backend == "reference":
        pytest.skip("it multiplies matrices of another size")
    lengths = [(1, 300), (9 if kit.SLOW else 33, 301), (2, 40), (1, 1), (5, 555), (1, 512)]
    problem = Problem((120, 16, 14, 2, 64), lengths, device, dtype)
    options = {}
    if rope:
        _, cache = half_split_angles(700, 64, device)
        options = {"cos_sin_cache": cache, "positions": torch.randint(0, 700, (120, 16), device=device)}
    out, lse = problem.run(backend, **options)
    again = problem.run(backend, **options)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    start = 0
    for row, (num_queries, num_keys) in enumerate(lengths):
        mine = slice(start, start + num_queries)
        for width in (-(-num_keys // 16), problem.table.shape[1]):  # nor on how wide the table is
            for offsets in (None, torch.tensor([0, num_queries], dtype=torch.int32, device=device)):
                alone = block_attention(
                    problem.q[mine], problem.k, problem.v, problem.table[row : row + 1, :width],
                    problem.seq_lens[row : row + 1], cu_seqlens_q=offsets, return_lse=True, backend=backend, **options,
                )  # fmt: skip
                assert torch.equal(alone[0], out[mine]) and torch.equal(alone[1], lse[mine])
        start += num_queries


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("ragged", [False, True])
def test_clips_over_many_keys_on_cuda(ragged):
    """So many that rows have splits although there are many of them; the same alone and between others."""
    lengths = [(300, 5000), (700, 6000), (1, 900)] if ragged else [(700, 6000)]
    problem = Problem((800, 16, 14, 2, 128), lengths, "cuda", torch.bfloat16)
    out, lse = problem.run("cuda")
    close((out, lse), problem.exact(tail), torch.bfloat16)
    mine = slice(300, 1000) if ragged else slice(None)
    alone = block_attention(
        problem.q[mine], problem.k, problem.v, problem.table[ragged : ragged + 1],
        problem.seq_lens[ragged : ragged + 1], return_lse=True, backend="cuda",
    )  # fmt: skip
    assert torch.equal(alone[0], out[mine]) and torch.equal(alone[1], lse[mine])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("lengths", [(60, 900), (196, 2500), (700, 6000), (1568, 3000)])
def test_clips_do_not_depend_on_how_wide_the_table_is_on_cuda(lengths):
    """A graph of a clip has a table of all blocks, whatever is in them."""
    problem = Problem((1200, 16, 28, 4, 128), [lengths], "cuda", torch.bfloat16)
    rest = torch.arange(1200, dtype=torch.int32, device="cuda")[None]
    for backend in {"cuda", "triton"} & set(backends("block_attention", "cuda")):
        results = [
            block_attention(problem.q, problem.k, problem.v, table, problem.seq_lens, backend=backend)
            for table in (problem.table[:, : -(-lengths[1] // 16)], torch.cat((problem.table, rest), dim=1))
        ]
        assert torch.equal(*results), backend


@each_backend
def test_order_of_blocks_does_not_matter_without_causality(backend, device):
    problem = Problem((30, 8, 6, 2, 16), [(2, 80)], device)
    expected = problem.run(backend, causal=False)
    problem.table = problem.table[:, torch.randperm(10, device=device)].contiguous()
    for a, b in zip(problem.run(backend, causal=False), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("parts", [[80, 80], [16, 64, 80], [160]])
def test_parts_merge_to_the_whole(parts, backend, device):
    problem = Problem((30, 8, 14, 2, 16), [(2, 160)], device)
    whole = problem.run(backend, causal=False)
    outs, lses, start = [], [], 0
    for length in parts:
        table = problem.table[:, start // 8 : (start + length) // 8].contiguous()
        out, lse = block_attention(
            problem.q, problem.k, problem.v, table, torch.tensor([length], device=device), causal=False,
            return_lse=True, backend=backend,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
        start += length
    for a, b in zip(merge_states(torch.stack(outs), torch.stack(lses)), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_layouts(layout, backend, device):
    problem = Problem((12, 16, 14, 2, 64), [(5, 60), (9, 33)], device)
    change = kit.LAYOUTS[layout]
    table = torch.full((2, 20), -1, dtype=torch.int32, device=device)
    table[:, 1 : 1 + problem.table.shape[1]] = problem.table
    results = problem.run(backend, k=change(problem.k), v=change(problem.v), q=kit.padded(problem.q))
    problem.table = table[:, 1 : 1 + problem.table.shape[1]]
    for a, b in zip(problem.run(backend), results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("most", [1, 500, 2_000])
def test_chunks_do_not_change_the_reference(most, monkeypatch):
    problem = Problem((30, 8, 6, 2, 16), [(5, 61), (7, 30)], "cpu")
    expected = problem.run("reference", window=20)
    monkeypatch.setattr(_chunks, "MAX_ELEMENTS", most)
    for a, b in zip(problem.run("reference", window=20), expected, strict=True):
        torch.testing.assert_close(a, b)


Q, K = torch.randn(6, 6, 8), torch.randn(5, 4, 2, 8)
TABLE, LENS = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
POSITIONS, CACHE = torch.zeros(5, 4, dtype=torch.int32), torch.zeros(9, 8)


@each_backend
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": K[0]}, r"k must have at least 4 dimensions; its shape is \(4, 2, 8\)"),
        ({"k": K[None], "v": K[None]}, r"k must have 4 dimensions; its shape is \(1, 5, 4, 2, 8\)"),
        ({"k": K.double()}, r"k has dtype float64; allowed"),
        ({"v": K[..., :4]}, r"v must have shape \[num_blocks, block_size, num_kv_heads, head_dim\] = \(5, 4, 2, 8\)"),
        ({"q": Q[None]}, r"q must have 3 dimensions; its shape is \(1, 6, 6, 8\)"),
        ({"q": Q.half()}, r"q has dtype float16; allowed: float32"),
        ({"q": Q[:, :5]}, r"q has 5 heads; allowed: multiples of num_kv_heads = 2"),
        ({"q": Q[:5]}, r"q has total_q = 5 rows; without cu_seqlens_q allowed: multiples of batch = 2"),
        ({"q": Q[:0]}, r"q is empty"),
        ({"q": Q[..., :4]}, r"q must have shape \[total_q, num_qo_heads, head_dim\] = \(6, 6, 8\), not \(6, 6, 4\)"),
        ({"block_table": TABLE.long()}, r"block_table has dtype int64; allowed: int32"),
        ({"block_table": TABLE[0]}, r"block_table must have at least 2 dimensions; its shape is \(3,\)"),
        ({"block_table": TABLE[:, None]}, r"block_table must have shape .* = \(2, 2, 3\), not \(2, 1, 3\)"),
        ({"block_table": TABLE[:, :0]}, r"block_table is empty"),
        ({"seq_lens": LENS[:1]}, r"seq_lens has 1 entries; the leading dimensions of block_table give 2"),
        ({"seq_lens": LENS.float()}, r"seq_lens has dtype float32; allowed: int32, int64"),
        ({"seq_lens": None}, r"seq_lens must be a torch.Tensor, not NoneType"),
        ({"cu_seqlens_q": LENS}, r"cu_seqlens_q must have shape \[batch \+ 1\] = \(3,\), not \(2,\)"),
        ({"cu_seqlens_q": torch.zeros(3)}, r"cu_seqlens_q has dtype float32; allowed: int32"),
        (
            {"positions": POSITIONS[:3]},
            r"positions must have shape \[num_blocks, block_size\] = \(5, 4\), not \(3, 4\)",
        ),
        ({"cos_sin_cache": CACHE}, r"cos_sin_cache was given without positions"),
        ({"packed": True}, r"packed was given without cos_sin_cache"),
        ({"q_positions": torch.zeros(6, dtype=torch.int32)}, r"q_positions was given without cos_sin_cache"),
        ({"cos_sin_cache": CACHE, "positions": POSITIONS, "q_positions": POSITIONS[0]}, r"q_positions must have shape"),
        ({"cos_sin_cache": CACHE.bfloat16(), "packed": True}, r"cos_sin_cache has dtype bfloat16; allowed: float32, f"),
        ({"positions": POSITIONS, "cos_sin_cache": CACHE[:, :4]}, r"cos_sin_cache must have shape .* = \(9, 8\)"),
        ({"sm_scale": float("inf")}, r"sm_scale=inf must be positive and finite"),
        ({"window": 0}, r"window=0 must be at least 1"),
        ({"window": 4, "causal": False}, r"window=4 needs causal=True"),
    ],
)
def test_refuses(change, message, backend, device):
    arguments = {"q": Q, "k": K, "v": K, "block_table": TABLE, "seq_lens": LENS, **change}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ArgumentError, match=message):
        block_attention(**moved, backend=backend)
