# SPDX-License-Identifier: Apache-2.0
"""The vision tower by hand: what transformers' modules compute, and only where these are what is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

import livevlm
from livevlm.models import adapter_for, siglip
from livevlm.models.vision import AT_ONCE, Vision, pooling_matrix, project_and_pool, unknown
from streams import pixels, real_config, tiny_random


def by_hand(inner: Any, frames: Tensor) -> Tensor:
    weight = inner.multi_modal_projector.linear_1.weight
    side = math.isqrt(inner.vision_tower.embeddings.num_patches)
    pooling = pooling_matrix(side, weight.dtype, weight.device)
    return project_and_pool(inner.multi_modal_projector, siglip.hidden_states(inner.vision_tower, frames), pooling)


def stock(inner: Any, frames: Tensor) -> Tensor:
    found = inner.get_video_features(frames[None]).pooler_output[0]
    return found[
        : len(frames) * adapter_for(SimpleNamespace(model=inner, lm_head=0, config=inner.config)).tokens_per_frame
    ]


def off(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double().flatten(), expected.double().flatten()
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(params=["random", "checkpoint"])
def inner(request: pytest.FixtureRequest) -> Any:
    """Sixteen patches a frame; a checkpoint with weights that were trained."""
    return (tiny_random() if request.param == "random" else livevlm.load("tiny", device="cpu").model).model


@torch.no_grad()
def test_equal_to_the_modules(inner: Any) -> None:
    assert unknown(inner) == ""
    size = inner.config.vision_config.image_size
    frames = F.interpolate(pixels(5), size=(size, size)).double()
    exact = stock(inner.double(), frames)
    assert off(by_hand(inner, frames), exact) < 1e-6  # the pooling matrix was made in float32
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        inner.to(dtype)
        mine, theirs = (off(way(inner, frames.to(dtype)), exact) for way in (by_hand, stock))
        assert mine < tolerance and mine < 1.3 * theirs + 1e-6, (mine, theirs)
    inner.vision_tower.encoder.layers[-1].mlp.fc2.bias.data += 0.1  # the comparison notices what is wrong
    assert off(by_hand(inner, frames.to(dtype)), exact) > 2 * mine


@pytest.mark.parametrize("side", [27, 4, 5, 1])
def test_pooling(side: int) -> None:
    """Odd sides too: a SigLIP frame has 27 x 27 patches."""
    size = SimpleNamespace(vision_config=SimpleNamespace(image_size=14 * side + 6, patch_size=14))
    patches = torch.randn(2, side * side, 40)
    pooled = LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=size), patches)
    matrix = pooling_matrix(side, torch.float32, torch.device("cpu"))
    assert matrix.shape == (math.ceil(side / 2) ** 2, side * side) and matrix.is_contiguous()
    torch.testing.assert_close(matrix @ patches, pooled, atol=1e-6, rtol=1e-6)
    for dtype, unit in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        rounded = patches.to(dtype)
        exact, weights = (
            LlavaOnevisionModel.apply_pooling(SimpleNamespace(config=size), rounded.double()),
            matrix.double(),
        )
        error = ((matrix.to(dtype) @ rounded).double() - exact).abs()
        assert bool((error <= unit * (weights @ rounded.double().abs() + exact.abs()) * 1.01 + 1e-6).all())


class Lora(nn.Linear):
    """Stands for whatever else a Linear can be."""


def lora(tower: Any) -> None:
    tower.encoder.layers[1].self_attn.q_proj = Lora(32, 32)


def wrapped(tower: Any) -> None:
    tower.encoder.layers[1].mlp.fc2 = nn.Sequential(tower.encoder.layers[1].mlp.fc2)


def other_activation(tower: Any) -> None:
    tower.encoder.layers[0].mlp.activation_fn = nn.GELU()


def other_class(tower: Any) -> None:
    tower.encoder.layers[0].__class__ = type("MyLayer", (type(tower.encoder.layers[0]),), {})


def other_dtype(tower: Any) -> None:
    tower.encoder.layers[1].layer_norm1.double()


def quantised(tower: Any) -> None:
    fc1 = tower.encoder.layers[0].mlp.fc1
    fc1._parameters["weight"] = fc1.weight.data.as_subclass(type("Packed", (Tensor,), {}))


def no_bias(tower: Any) -> None:
    tower.encoder.layers[0].self_attn.k_proj.bias = None


def padded(tower: Any) -> None:
    tower.embeddings.patch_embedding.padding = (1, 1)


def eager(tower: Any) -> None:
    tower.config._attn_implementation = "eager"


def drops_out(tower: Any) -> None:
    tower.config.attention_dropout = 0.1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lora, "a Lora stands for a Linear"),
        (wrapped, "a Sequential stands for a Linear"),
        (other_activation, "a GELU stands for a GELUTanh"),
        (other_class, "a MyLayer stands for a SiglipEncoderLayer"),
        (other_dtype, "differ in kind, dtype or device"),
        (quantised, "differ in kind, dtype or device"),
        (no_bias, "a Linear has no bias"),
        (padded, "not one product"),
        (eager, "attention is 'eager'"),
        (drops_out, "drops out"),
    ],
)
def test_other_towers_are_refused(change: Callable[[Any], None], why: str) -> None:
    inner = tiny_random().model
    assert unknown(inner) == ""
    change(inner.vision_tower)
    assert why in unknown(inner)


def test_other_models_are_refused() -> None:
    inner = tiny_random().model
    inner.multi_modal_projector.linear_2 = Lora(224, 224)
    assert "a Lora stands for a Linear" in unknown(inner)
    inner = tiny_random().model
    inner.apply_pooling = lambda features: features
    assert "apply_pooling" in unknown(inner)
    for layer, strategy in ((-2, "full"), (-1, "default"), ([-1, -2], "full")):
        inner.config.vision_feature_layer, inner.config.vision_feature_select_strategy = layer, strategy
        assert "vision_feature_layer" in unknown(inner)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand on a CPU too."""
    monkeypatch.setattr(Vision, "_why_modules", lambda self: self.hooked or unknown(self._inner))


def test_a_change_is_noticed_before_each_use(anywhere: None) -> None:
    model = tiny_random()
    adapter, tower, frames = adapter_for(model), model.model.vision_tower, pixels(AT_ONCE + 1)
    with torch.no_grad():
        expected = stock(model.model, frames)
        close = adapter.embed_frames(frames)
        assert adapter.vision().said == "by hand" and adapter.vision() is adapter.vision()
        torch.testing.assert_close(close, expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(close, expected)  # else this tests nothing

        calls: list[nn.Module] = []
        handle = tower.encoder.layers[1].mlp.fc1.register_forward_hook(lambda module, *_: calls.append(module))
        assert torch.equal(adapter.embed_frames(frames), expected) and len(calls) == 1
        assert adapter.vision().said == "modules: a Linear has hooks" == f"modules: {adapter.vision().hooked}"
        handle.remove()
        assert torch.equal(adapter.embed_frames(frames), close)

        tower.set_attn_implementation("eager")
        adapter.embed_frames(frames)
        assert adapter.vision().said == "modules: its attention is 'eager'" and not adapter.vision().hooked
        tower.set_attn_implementation("sdpa")

        before = adapter.vision()
        tower.encoder.layers[0].mlp.fc2.weight.data = tower.encoder.layers[0].mlp.fc2.weight.data * 1.5
        assert adapter.vision() is not before
        torch.testing.assert_close(adapter.embed_frames(frames), stock(model.model, frames), atol=1e-5, rtol=1e-5)

        before = adapter.vision()
        model.bfloat16()
        assert adapter.embed_frames(frames).dtype == torch.bfloat16 and adapter.vision() is not before
        assert adapter.vision().said == "by hand"


def test_gradients_come_from_the_modules(anywhere: None) -> None:
    model = tiny_random()
    frames = pixels(2).requires_grad_()
    adapter_for(model).embed_frames(frames).square().sum().backward()
    assert frames.grad is not None and bool(frames.grad.abs().sum() > 0)


@torch.no_grad()
def test_a_cpu_computes_by_modules() -> None:
    """Whose bits it keeps, as transformers keeps them."""
    model = tiny_random()
    adapter = adapter_for(model)
    assert torch.equal(adapter.embed_frames(pixels(3)), stock(model.model, pixels(3)))
    assert adapter.vision().said == "modules: cpu"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_in_a_product_is_the_form_with_tanh(dtype: torch.dtype) -> None:
    """Left of zero, where both forms are small, and 16 bits enough to tell them apart."""
    linear = nn.Linear(64, 64).to("cuda", dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(64))
        linear.bias.zero_()
        x = torch.linspace(-3, -1.5, 64 * 64, device="cuda", dtype=dtype).view(1, 64, 64)
        got = siglip._gelu(linear, x).double()
    tanh, erf = (F.gelu(x.double(), approximate=form) for form in ("tanh", "none"))
    assert float((got - tanh).abs().max()) < 2e-3
    assert off(got, tanh) < off(got, erf)


@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_real_tower_on_a_gpu(dtype: torch.dtype) -> None:
    """Sizes of SigLIP: 27 x 27 patches, head_dim 72; three layers. As close to float32 as the modules are."""
    config = real_config("0.5B")
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 3, 1
    with torch.device("cuda"):
        model = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=dtype).eval()
        frames = torch.randn(AT_ONCE + 1, 3, 384, 384).to(dtype)
    adapter = adapter_for(model)
    assert adapter.vision().said == "by hand"
    mine = {count: adapter.embed_frames(frames[:count]) for count in (1, AT_ONCE, AT_ONCE + 1)}
    theirs = stock(model.model, frames)
    exact = stock(model.model.float(), frames.float())
    for count, found in mine.items():
        tokens = count * adapter.tokens_per_frame
        assert found.dtype == dtype and len(found) == tokens
        assert off(found, exact[:tokens]) < 1.3 * off(theirs[:tokens], exact[:tokens])
    assert torch.equal(mine[AT_ONCE], mine[AT_ONCE + 1][: len(mine[AT_ONCE])])
    assert adapter.vision().said == "modules: float32"
