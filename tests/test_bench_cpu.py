# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run on a CPU too: every op and backend, what they are compared with, and the harness itself."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")

import livevlm_kernels
from livevlm_kernels import _registry

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def harness():
    module = load("kit")
    module.copy_ceiling = lambda device: 10.0  # takes half a second
    return module


# ---------------------------------------------------------------- ops
LAYERS, TOKENS, HEADS, DIM, FRAME = 4, 448, 4, 128, 28


def randn(*shape):
    return torch.randn(shape).bfloat16()


def arguments(op):
    """A call on 16 frames of 28 tokens, 7B heads, 4 layers."""
    torch.manual_seed(0)
    k, v, q = randn(LAYERS, TOKENS, HEADS, DIM), randn(LAYERS, TOKENS, HEADS, DIM), randn(LAYERS, 16, 28, DIM)
    slots = (torch.arange(TOKENS, dtype=torch.int32) % FRAME).repeat(LAYERS, 1)
    half = torch.arange(0, TOKENS, 2, dtype=torch.int32).repeat(LAYERS, 1)
    pool = k.view(LAYERS * TOKENS // 16, 16, HEADS, DIM), v.view(LAYERS * TOKENS // 16, 16, HEADS, DIM)
    return {
        "summarize_blocks": {"k": k, "block_size": 16},
        "score_tokens": {"q": q, "k": k, "reduction": "layer"},
        "score_redundancy": {"k": k, "v": v, "recent_k": k[:, -FRAME:].unflatten(1, (1, FRAME)), "slots": slots},
        "score_novelty": {"x": v, "usual": randn(LAYERS, FRAME, HEADS, DIM).float(), "slots": slots,
                          "previous": (torch.arange(TOKENS, dtype=torch.int32) - FRAME).repeat(LAYERS, 1)},
        "select_tokens": {"scores": torch.rand(LAYERS, TOKENS), "budget": TOKENS // 2, "scatter_ratio": 0.5},
        "compact_tokens": {"tensors": [k, v, slots], "indices": half},
        "evict_similar": {
            "k": k, "v": v, "slots": slots, "budget": TOKENS // 2, "num_recent_frames": 2, "tokens_per_frame": FRAME,
        },
        "merge_tokens": {"k": k, "v": v, "groups": torch.arange(TOKENS, dtype=torch.int32).expand_as(slots) // FRAME,
                         "num_groups": TOKENS // FRAME},
        "retrieve_blocks": {"q": q, "keys": randn(LAYERS, 28, HEADS, DIM).float(), "num_selected": 11},
        "block_attention": {
            "q": randn(2 * 8, 28, DIM), "k": pool[0], "v": pool[1],
            "block_table": torch.randperm(40, dtype=torch.int32).view(2, 20),
            "seq_lens": torch.tensor([320, 100], dtype=torch.int32),
        },
        "quantize_blocks": {"k": pool[0], "v": pool[1], "dtype": "int4"},
        "merge_states": {"outs": randn(3, 64, 28, DIM), "lses": torch.randn(3, 64, 28)},
    }[op]  # fmt: skip


def call(op, given, backend):
    """The result, and what was written in place."""
    result = getattr(livevlm_kernels, op)(**given, backend=backend)
    written = {"compact_tokens": ["tensors"], "evict_similar": ["k", "v"]}.get(op, [])
    return [result, *(given[name] for name in written)]


def tensors_of(nested):
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for item in nested or () for tensor in tensors_of(item)]


def same(result, expected, rtol=2e-2, atol=1e-3):
    """Rounding of bf16 is allowed, in what is not a whole number."""
    for mine, other in zip(tensors_of(result), tensors_of(expected), strict=True):
        exact = not mine.is_floating_point()
        torch.testing.assert_close(mine, other, rtol=0 if exact else rtol, atol=0 if exact else atol)


@pytest.mark.parametrize(
    ("op", "backend"), [(op, name) for op in _registry.ops() for name in livevlm_kernels.backends(op, "cpu")]
)
def test_op(benchmark, op, backend):
    result = benchmark.pedantic(call, setup=lambda: ((op, arguments(op), backend), {}), rounds=5, warmup_rounds=1)
    same(result, call(op, arguments(op), "reference"))


# ---------------------------------------------------------------- what the ops are compared with
def test_baselines_compute_what_the_ops_do():
    by_hand, shapes = load("baselines"), load("shapes")
    given = {op: arguments(op) for op in _registry.ops()}
    for reduction in ("layer", "shared"):
        rope = {
            "positions": torch.arange(TOKENS, dtype=torch.int32).repeat(LAYERS, 1),
            "cos_sin_cache": shapes.rope_table(TOKENS, DIM, "cpu"),
        }
        options = given["score_tokens"] | rope | {"reduction": reduction}
        same(by_hand.score_tokens(**options), livevlm_kernels.score_tokens(**options), atol=1e-5)
    for per_head in (True, False):
        options = given["score_redundancy"] | {"per_head": per_head}
        expected = livevlm_kernels.score_redundancy(**options)
        same(by_hand.score_redundancy(**options), expected, atol=1e-2)
        if per_head:
            peer = by_hand.infinipot_v_scores(options["k"], options["v"], 1, FRAME)
            same(peer, expected, atol=1e-2)
    given["score_novelty"]["previous"] %= TOKENS  # every token has one
    same(by_hand.score_novelty(**given["score_novelty"]), livevlm_kernels.score_novelty(**given["score_novelty"]))
    for ratio in (0.0, 0.3, 0.5):
        scores = given["select_tokens"]["scores"].clone()
        scores[:, -5:] = torch.inf
        expected, _ = livevlm_kernels.select_tokens(scores, 200, scatter_ratio=ratio)
        same(by_hand.select_tokens(scores, 200, scatter_ratio=ratio)[0], expected)
    same(
        by_hand.summarize_blocks(**given["summarize_blocks"]),
        livevlm_kernels.summarize_blocks(**given["summarize_blocks"]),
    )


def test_baselines_of_eviction_and_merging():
    by_hand = load("baselines")
    for shared in (False, True):
        given = arguments("evict_similar") | {"shared": shared}
        k, v = given["k"].float(), given["v"].float()  # no rounding that could decide between two tokens
        mine = by_hand.evict_similar(**given | {"k": k, "v": v})
        budget = given["budget"]
        indices, _ = livevlm_kernels.evict_similar(**given | {"k": k, "v": v})
        same(mine, [indices, k[:, :budget], v[:, :budget]])
    del given["shared"], given["slots"]
    k, v = arguments("evict_similar")["k"].float(), arguments("evict_similar")["v"].float()
    mine = by_hand.infinipot_v_evict(**given | {"k": k, "v": v})
    indices, _ = livevlm_kernels.evict_similar(**arguments("evict_similar") | {"k": k, "v": v, "per_head": True})
    same(mine, [indices, k[:, :budget], v[:, :budget]])

    given = arguments("merge_tokens")
    k, v = given["k"], given["v"]
    for weights in (None, torch.rand(LAYERS, TOKENS)):
        expected = livevlm_kernels.merge_tokens(**given, weights=weights)
        same(by_hand.merge_frames(k, v, given["num_groups"], weights), expected)
        same(by_hand.merge_groups(**given, weights=weights), expected)
    k = k.float()
    k[:, 1::2] += k[:, ::2].flip(1)
    even = arguments("compact_tokens")["indices"]
    same(by_hand.merge_pairs(k, v.float()), livevlm_kernels.merge_tokens(k, v.float(), indices=even))
    assert [x.shape[1] for x in by_hand.tome(k, v)] == [TOKENS // 2] * 3
    assert by_hand.kvpress_merging(k, v)[1].shape == (LAYERS, HEADS, TOKENS // 2, DIM)


# ---------------------------------------------------------------- peers of attention
@pytest.fixture(scope="module")
def attention_peers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "baselines", load("baselines"))
        yield load("attention_peers")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("num_queries", [1, 8])
def test_peers_compute_block_attention(attention_peers, num_queries):
    peers, given = attention_peers, arguments("block_attention")
    table = torch.stack((torch.randperm(15), torch.randperm(15) + 16)).int()
    table = torch.cat((table, torch.tensor([[15], [31]], dtype=torch.int32)), 1)  # a block with the queries comes last
    k, v, q = given["k"][:32].float(), given["v"][:32].float(), randn(2 * num_queries, 28, DIM).float()
    seq_lens = torch.full((2,), 256, dtype=torch.int32)
    expected = livevlm_kernels.block_attention(q, k, v, table, seq_lens, backend="reference")
    same(peers.gather_sdpa(q, k, v, table), expected, rtol=1e-4, atol=1e-5)
    same(peers.dense_sdpa(q, k, v, 2), expected, rtol=1e-4, atol=1e-5)
    one = q[:num_queries], k[:16], v[:16]
    dense = peers.sdpa(one[0], *(x.view(1, 256, HEADS, DIM) for x in one[1:]))
    mask = peers.causal_mask(num_queries, 256, q.dtype, "cpu")
    same(peers.sdpa(one[0], *(x.view(1, 256, HEADS, DIM) for x in one[1:]), mask), dense, rtol=1e-4, atol=1e-5)
    same(peers.flex(*one, peers.flex_mask(num_queries, 256, "cpu")), dense, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="blocks of 128"):
        peers.flex_mask(1, 200, "cpu")


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("mean", "query"), ("mean", "softmax"), ("minmax", "query"), ("minmax", "softmax"), ("mass", "softmax")],
)
def test_peers_compute_retrieval(attention_peers, kind, pooling, per_head):
    if kind == "mass" and per_head:
        pytest.skip("the peer adds heads up")
    q = randn(LAYERS, 16, 28, DIM).float()
    shape = {"mean": (28,), "minmax": (28, 2), "mass": (TOKENS,)}[kind]
    keys = randn(LAYERS, *shape, HEADS, DIM).float()
    if kind == "minmax":
        keys = keys.sort(2).values
    options = {"kind": kind, "pooling": pooling, "per_head": per_head}
    size = {"block_size": 16} if kind == "mass" else {}
    expected, _ = livevlm_kernels.retrieve_blocks(q, keys, num_selected=9, **options, **size, backend="reference")
    same(attention_peers.retrieve(q, keys, 9, **options, block_size=16), expected)


def test_peers_retrieve_and_attend(attention_peers):
    q, summaries = randn(8, 28, DIM).float(), randn(28, HEADS, DIM).float()
    k, v = randn(28, 16, HEADS, DIM).float(), randn(28, 16, HEADS, DIM).float()
    table, _ = livevlm_kernels.retrieve_blocks(q, summaries, num_selected=9, backend="reference")
    seq_lens = torch.tensor([9 * 16], dtype=torch.int32)
    expected = livevlm_kernels.block_attention(q, k, v, table[None], seq_lens, causal=False, backend="reference")
    same(attention_peers.retrieve_and_attend(q, summaries, k, v, 9), (expected, table), rtol=1e-4, atol=1e-5)
    given = arguments("merge_states")
    same(attention_peers.merge_states(**given), livevlm_kernels.merge_states(**given, backend="reference"))


def test_flashinfer_is_optional(monkeypatch):
    peer = load("flashinfer_peer")
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    module, why = peer.load()
    assert module is None and why.startswith("FlashInfer cannot be imported: ModuleNotFoundError")
    starts, indices, last = peer.pages(torch.tensor([[3, 1, 2], [0, 5, 4]], dtype=torch.int32), 40, 16)
    assert (starts.tolist(), indices.tolist(), last.tolist()) == ([0, 3, 6], [3, 1, 2, 0, 5, 4], [8, 8])


def test_attention_peers_in_the_harness(harness, tmp_path, monkeypatch, capsys):
    """A reference that is not timed, inputs that are not counted, and calls that are timed from Python."""
    monkeypatch.setitem(sys.modules, "kit", harness)
    extra = load("attention_kit")
    bench = harness.Bench("an_op", "cpu", tmp_path)

    def make():
        return extra.PartlyRead({"x": torch.ones(4, 4), "k": torch.ones(100)}, hidden=["k"])

    providers = {
        "expected": extra.checked_only(lambda s: {"a": s["x"] * 2}),
        "mine": lambda s: {"a": s["x"] + s["k"][:4]},
    }
    rows = bench.run("4x4", torch.float32, make, 128, providers, extra.close_by_name)
    assert [row.provider for row in rows] == ["mine"]
    assert harness.nbytes(list(make().values())) == 64
    assert "expected                             n/a: compared with, not timed" in capsys.readouterr().out
    extra.called_from_python(bench, "4x4", make, 128, {"mine": providers["mine"]}, rows)
    assert [row["provider"] for row in table_of(tmp_path)] == ["mine", "mine, from Python"]
    with pytest.raises(AssertionError, match="relative error"):
        extra.close(torch.ones(3, 4), torch.full((3, 4), 1.02))
    monkeypatch.setenv("ONLY", "decode.*batch 1$")
    assert extra.wanted("7B decode batch 1") and not extra.wanted("7B decode batch 16")
    assert extra.visible_pairs(3, 5) == 3 + 4 + 5


# ---------------------------------------------------------------- the harness
def run_small(harness, path, providers, **options):
    bench = harness.Bench("an_op", "cpu", path)
    return bench.run("4x4", torch.float32, lambda: {"x": torch.ones(4, 4)}, 128, providers, **options)


def table_of(path):
    with (path / "an_op.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def double(inputs):
    return inputs["x"] * 2


def broken(inputs):
    raise NotImplementedError("no such kernel")


def test_rows_are_replaced_by_key(harness, tmp_path):
    twice = {"reference": double, "other": lambda s: s["x"] + s["x"]}
    run_small(harness, tmp_path, twice)
    rows = run_small(harness, tmp_path, twice)
    assert [row.provider for row in rows] == ["reference", "other"]
    assert all(row.p20_us <= row.median_us <= row.p80_us for row in rows)
    assert rows[0].ratio == 1 and rows[1].ratio > 0
    assert len(table_of(tmp_path)) == 2
    run_small(harness, tmp_path, {"third": double})
    assert len(table_of(tmp_path)) == 3


def test_columns_of_all_rows_are_in_the_file(harness, tmp_path):
    run_small(harness, tmp_path, {"reference": double})
    before = list(table_of(tmp_path)[0])
    run_small(harness, tmp_path, {"other": double}, columns=lambda us: {"tflops": 7})
    first, second = table_of(tmp_path)
    assert list(first) == [*before, "tflops"]
    assert (first["tflops"], second["tflops"]) == ("", "7")
    assert set(harness.KEY) <= set(before)


def test_a_wrong_kernel_is_not_timed(harness, tmp_path, capsys):
    wrong = {"reference": lambda s: s["x"], "wrong": lambda s: s["x"] + 1}
    with pytest.raises(AssertionError, match="wrong"):
        run_small(harness, tmp_path, wrong)
    assert [row["provider"] for row in table_of(tmp_path)] == ["reference"]
    with (
        pytest.raises(SystemExit, match="1 failed"),
        harness.Bench("an_op", "cpu", tmp_path) as bench,
    ):
        bench.run("4x4", torch.float32, lambda: {"x": torch.ones(4, 4)}, 128, wrong)
        bench.run("later", torch.float32, lambda: {"x": torch.ones(4, 4)}, 128, {"reference": double})
    assert [row["shape"] for row in table_of(tmp_path)] == ["4x4", "later"]
    assert "WRONG" in capsys.readouterr().out


def test_another_result_must_be_named_so(harness, tmp_path):
    rows = run_small(harness, tmp_path, {"reference": double, "peer (other result)": lambda s: s["x"]})
    assert [row.provider for row in rows] == ["reference", "peer (other result)"]


def test_what_cannot_run_is_reported(harness, tmp_path, capsys):
    rows = run_small(harness, tmp_path, {"reference": double, "peer": broken})
    assert [row.provider for row in rows] == ["reference"]
    assert "n/a: NotImplementedError: no such kernel" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="cuda"):  # a backend of our own must run
        run_small(harness, tmp_path, {"reference": double, "cuda": broken})


def test_inputs_of_ops_in_place_are_restored(harness, tmp_path):
    seen = []

    def add(inputs):
        seen.append(inputs["x"].sum().item())
        return inputs["x"].add_(1)

    rows = run_small(harness, tmp_path, {"reference": add, "again": add}, in_place=True)
    assert len(rows) == 2
    # Timers call once to warm up, then restore before each sample: never more than one addition has happened.
    assert set(seen) <= {16.0, 32.0} and seen.count(16.0) > len(seen) * 0.8


def test_inputs_are_cold(harness, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=1000))
    sets = harness.cold_sets(lambda: {"x": torch.zeros(100)}, "cuda")
    assert harness.nbytes([one["x"] for one in sets]) > 5000
    shared = torch.zeros(100)
    with pytest.raises(RuntimeError, match="not cold"):
        harness.cold_sets(lambda: {"x": shared}, "cuda")


def test_shared_memory_counts_once(harness):
    x = torch.zeros(10)
    assert harness.nbytes([x, x[2:], torch.zeros(5)]) == 60


def test_results_that_are_committed_stay_readable(harness):
    for path in (ROOT / "bench" / "results").glob("*.csv"):
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        assert set(harness.KEY) <= set(header) or path.stem not in _registry.ops()


def test_every_package_is_installed():
    """pyproject.toml lists packages one by one, because the folder of the benchmarks has another name."""
    tomllib = pytest.importorskip("tomllib")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"livevlm_bench"}
    for base in (ROOT / "python", ROOT):
        for top in ("livevlm", "livevlm_kernels"):
            found |= {".".join(init.parent.relative_to(base).parts) for init in (base / top).rglob("__init__.py")}
    assert found == set(setuptools["packages"])
