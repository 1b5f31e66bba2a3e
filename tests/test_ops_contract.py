# SPDX-License-Identifier: Apache-2.0
"""What holds for every op: schema, fake tensors, torch.compile, backends that are asked for by name, docstrings."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kit
import livevlm_kernels
from livevlm_kernels import BackendError, _registry

LENS = torch.tensor([20, 7], dtype=torch.int32)
SLOTS = (torch.arange(20) % 4).int().repeat(2, 1)
INDICES = torch.tensor([[1, 3, 4, 10, 11, 19], [0, 2, 5, -1, -1, -1]], dtype=torch.int32)
PREVIOUS = (torch.arange(20) - 4).int().repeat(2, 1)
POSITIONS = torch.arange(20).repeat(2, 1)
CACHE = torch.randn(64, 8)
TABLE = torch.tensor([[3, 1, -1], [0, 2, 4]], dtype=torch.int32)

POOLS = [  # quantised, as arguments
    livevlm_kernels.quantize_blocks(*torch.randn(2, 5, 4, 2, 8), dtype=dtype, backend="reference")._asdict()
    for dtype in ("fp8", "int4")
]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def calls(op):
    """Arguments for calls that between them use every optional argument of the op."""
    k, v, q = randn(2, 20, 2, 8), randn(2, 20, 2, 8), randn(2, 3, 6, 8)
    rope = {"positions": POSITIONS, "cos_sin_cache": CACHE}
    pool, paged_q = (randn(5, 4, 2, 8), randn(5, 4, 2, 8)), randn(6, 6, 8)
    slot_positions = torch.arange(20).view(5, 4)
    return {
        "summarize_blocks": [
            {"k": k, "block_size": 8},
            {"k": k, "block_size": 8, "kind": "minmax", "seq_lens": LENS, "first_token": LENS,
             "out": randn(2, 3, 2, 2, 8)},
        ],
        "score_tokens": [
            {"q": q, "k": k},
            {"q": q, "k": k, "seq_lens": LENS, "sm_scale": 0.5, "causal": True, "reduction": "layer", **rope},
            {"q": q, "k": k, "reduction": "shared"},
        ],
        "score_redundancy": [
            {"k": k, "v": v, "recent_k": randn(2, 3, 4, 2, 8), "slots": SLOTS},
            {"k": k, "v": v, "recent_k": randn(2, 1, 4, 2, 8), "slots": SLOTS, "seq_lens": LENS, "per_head": False},
        ],
        "score_novelty": [
            {"x": k, "usual": randn(2, 4, 2, 8), "slots": SLOTS, "previous": PREVIOUS},
            {"x": k, "usual": randn(2, 4, 2, 8), "slots": SLOTS, "previous": PREVIOUS, "seq_lens": LENS},
        ],
        "select_tokens": [
            {"scores": randn(2, 20), "budget": 6},
            {"scores": randn(2, 20), "budget": 6, "seq_lens": LENS, "scatter_ratio": 0.5, "num_buckets": 4,
             "bucket_capacity": 2, "buckets": SLOTS},
        ],
        "compact_tokens": [
            {"tensors": [k, v, POSITIONS.clone()], "indices": INDICES},
            {"tensors": [k, v], "indices": INDICES[:, None].repeat(1, 2, 1), "per_head": True},
        ],
        "evict_similar": [
            {"k": k, "v": v, "slots": SLOTS, "budget": 12, "num_recent_frames": 2, "tokens_per_frame": 4, **options}
            for options in ({}, {"alpha": 0.2, "shared": True, "tensors": [POSITIONS.clone()]}, {"per_head": True})
        ],
        "merge_tokens": [
            {"k": k, "v": v, "groups": SLOTS, "num_groups": 4},
            {"k": k, "v": v, "indices": INDICES, "sizes": torch.rand(2, 20), "weights": torch.rand(2, 20),
             "seq_lens": LENS},
        ],
        "retrieve_blocks": [
            {"q": q, "keys": k, "num_selected": 4},
            {"q": q, "keys": randn(2, 9, 2, 2, 8), "kind": "minmax", "pooling": "softmax", "num_selected": 4,
             "ratio": 0.4, "seq_lens": LENS, "num_sink_blocks": 1, "num_recent_blocks": 1, "per_head": True},
            {"q": q, "keys": k, "kind": "mass", "block_size": 8, "num_selected": 2, "sm_scale": 0.5},
        ],
        "block_attention": [
            {"q": paged_q, "k": pool[0], "v": pool[1], "block_table": TABLE, "seq_lens": LENS.clamp(max=12)},
            {"q": paged_q, "k": pool[0], "v": pool[1], "block_table": TABLE[:, None].repeat(1, 2, 1),
             "seq_lens": LENS.clamp(max=8), "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
             "positions": slot_positions, "cos_sin_cache": CACHE, "sm_scale": 0.5, "window": 5, "return_lse": True},
            {"q": paged_q, "k": pool[0], "v": pool[1], "block_table": TABLE, "seq_lens": LENS, "causal": False,
             "cos_sin_cache": CACHE.half(), "q_positions": torch.arange(len(paged_q)), "packed": True},
            {"q": paged_q, **POOLS[0], "block_table": TABLE, "seq_lens": LENS.clamp(max=12)},
            {"q": paged_q.bfloat16(), **POOLS[1], "block_table": TABLE, "seq_lens": LENS.clamp(max=12)},
        ],
        "quantize_blocks": [
            {"k": pool[0], "v": pool[1], "dtype": "fp8"},
            {"k": pool[0], "v": pool[1], "dtype": "int4", "positions": slot_positions - 3},
        ],
        "merge_states": [{"outs": randn(3, 4, 2, 8), "lses": randn(3, 4, 2)}],
    }[op]  # fmt: skip


OPS = _registry.ops()
CALLS = [pytest.param(op, number, id=f"{op}-{number}") for op in OPS for number in range(len(calls(op)))]
PLACES = {op: kit.cases(op) for op in OPS}
CASES = [
    pytest.param(*call.values, *place.values, id=f"{call.id}-{place.id}", marks=place.marks)
    for call in CALLS
    for place in PLACES[call.values[0]]
]
each_case = pytest.mark.parametrize(("op", "number", "backend", "device"), CASES)


def mapped(function, value):
    """`function` applied to the tensors in a call's arguments."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: mapped(function, x) for name, x in value.items()}
    return [mapped(function, x) for x in value] if isinstance(value, list) else value


def prepared(op, number, device):
    torch.manual_seed(number)
    return mapped(lambda x: x.to(device), calls(op)[number])


class Record(TorchDispatchMode):
    """Remembers the calls of this library's ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "livevlm_kernels":
            self.calls.append((function, mapped(torch.Tensor.clone, list(args)), kwargs or {}))
        return function(*args, **(kwargs or {}))


@each_case
def test_opcheck(op, number, backend, device):
    with Record() as record:
        getattr(livevlm_kernels, op)(**prepared(op, number, device), backend=backend)
    [(function, args, kwargs)] = record.calls  # one public call is one dispatcher op
    assert function.name() == kit.overload(op, backend).name()
    torch.library.opcheck(function, tuple(args), kwargs)


def longer(x):
    """Three tokens more than the 20 of `calls`."""
    x = x.clone()
    for dim, size in enumerate(x.shape):
        if size == 20:
            x = x.index_select(dim, torch.arange(23, device=x.device) % 20)
    return x


@each_case
def test_compiled_equals_eager(op, number, backend, device):
    """Also for another length, and then without compiling again: a memory grows while its video plays."""
    torch.compiler.reset()
    function = getattr(livevlm_kernels, op)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for change, config in ((torch.clone, {}), (longer, {"error_on_recompile": True})):
        eager, traced = mapped(change, prepared(op, number, device)), mapped(change, prepared(op, number, device))
        expected = function(**eager, backend=backend)
        with torch._dynamo.config.patch(**config):
            result = compiled(**traced, backend=backend)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(tensors(traced), tensors(eager), rtol=0, atol=0, equal_nan=True)  # what is written


def tensors(arguments):
    return [x for value in arguments.values() for x in (value if isinstance(value, list) else [value])
            if isinstance(x, torch.Tensor)]  # fmt: skip


def described(result):
    """Shape, dtype, strides of every tensor in a result."""
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    return [(x.shape, x.dtype, x.stride()) for x in results]


@pytest.mark.parametrize(("op", "number"), CALLS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(op, number, device):
    """Shapes are known without a GPU, also for tensors of one."""
    function = getattr(livevlm_kernels, op)
    expected = described(function(**prepared(op, number, "cpu"), backend="reference"))
    arguments = calls(op)[number]
    with FakeTensorMode():
        fakes = mapped(lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device), arguments)
        result = function(**fakes)
    assert described(result) == expected
    assert all(x.device.type == device for x in (result if isinstance(result, tuple) else (result,)) if x is not None)
    result = function(**mapped(lambda x: x.to("meta"), arguments))
    assert described(result) == expected


@pytest.mark.parametrize("op", OPS)
def test_a_backend_asked_for_by_name_never_falls_back(op, monkeypatch):
    function = getattr(livevlm_kernels, op)
    for name, overload in list(_registry._OVERLOADS.items()):
        if name == (op, "reference"):
            monkeypatch.setitem(_registry._OVERLOADS, name, lambda *a, _op=overload: pytest.fail("fell back"))
    for backend in ("cuda", "triton", "cpu", "numpy"):
        if backend in livevlm_kernels.backends(op, "cpu"):
            continue
        arguments = prepared(op, 0, "cpu")
        before = [x.clone() for x in tensors(arguments)]
        with pytest.raises(BackendError, match=f"backend='{backend}'"):
            function(**arguments, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(tensors(arguments), before, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_docstring_names_every_parameter(op):
    function = getattr(livevlm_kernels, op)
    text = inspect.getdoc(function)
    section = text[text.index("Args:") : text.index("Raises:")]
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^    {name}: ", section, re.MULTILINE), f"{op}: {name} is not documented"
    for word in ("ArgumentError:", "BackendError:"):
        assert word in text[text.index("Raises:") :]
    assert re.search(r"arXiv \d{4}\.\d{5}|\bours\b", text), f"{op}: where is it from?"


@pytest.mark.parametrize("op", OPS)
def test_calls_here_use_every_parameter(op):
    used = {name for arguments in calls(op) for name in arguments}
    assert used >= set(inspect.signature(getattr(livevlm_kernels, op)).parameters) - {"backend"}


def test_every_op_is_exported():
    assert set(OPS) <= set(livevlm_kernels.__all__)


@pytest.mark.cuda
@pytest.mark.parametrize(("op", "number"), CALLS)
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_cuda_graph(op, number, backend):
    """No op synchronises or allocates on the host side: each can be captured, and a replay reads the new inputs."""
    if backend not in livevlm_kernels.backends(op, "cuda"):
        pytest.skip(f"{op} has no {backend} kernel in this build")
    function = getattr(livevlm_kernels, op)
    arguments, new = prepared(op, number, "cuda"), prepared(op, number, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up outside of the capture: libraries initialise at their first call
        function(**prepared(op, number, "cuda"), backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = function(**arguments, backend=backend)
    for x, y in zip(tensors(arguments), tensors(new), strict=True):
        y.copy_(y.flip(0) if y.dtype in kit.DTYPES else y)
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(result, function(**new, backend=backend), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tensors(arguments), tensors(new), rtol=0, atol=0, equal_nan=True)
