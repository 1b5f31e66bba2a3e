# SPDX-License-Identifier: Apache-2.0
"""The whole compression of a clip of 32 frames that arrives at a full memory, all layers, as each policy does it.

vision_sink: score_tokens with RoPE at read, select_tokens, compact_tokens of keys, values and facts. similarity:
evict_similar, compact_tokens of the facts. clip_merge: score_tokens, select_tokens and merge_tokens of the clip, and
compact_tokens of what is older. Each is followed by summarize_blocks of all that is kept. The column percent_of_encode
compares the time with the language model's for the clip. Peers' policies are not here: they differ in every step.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import baselines
import kit
import livevlm_kernels
from bench_compact_tokens import FACTS
from shapes import DTYPE, Model, models, rope_table

# The 7B language model's forward of a 32-frame clip over 14k keys, plain SDPA, transformers 5.17 on an H100: 8.4 ms a
# frame. Vision (1.65 ms a frame or more) comes on top, so percentages of it are upper bounds: for the share of
# the whole encoding multiply by 8.4 / (8.4 + 1.65).
ENCODE_MS = {"7B": 32 * 8.4}
NUM_QUERIES, BLOCK_SIZE, RECENT = 64, 16, 2  # livevlm.Config's defaults; the last in frames
KEEP_RATIO = 0.25  # of a clip, in clip_merge
OPS = ("score_tokens", "select_tokens", "compact_tokens", "evict_similar", "merge_tokens", "summarize_blocks")
TENSORS = ("k", "v", *FACTS)


def make(model: Model, device: str) -> kit.Inputs:
    """A memory whose tokens are numbered by `position`, and the queries of the newest ones."""
    layers, tokens = model.num_layers, model.full
    number = torch.arange(tokens, dtype=torch.int32, device=device).repeat(layers, 1)
    slot = model.slots(tokens, device)
    return {
        "k": model.kv(tokens, device),
        "v": model.kv(tokens, device),
        "position": number,
        "frame": number // model.tokens_per_frame,
        "slot": slot,
        "time": number.double() / model.tokens_per_frame,
        "size": torch.ones(layers, tokens, device=device),
        "q": torch.randn(layers, NUM_QUERIES, model.num_qo_heads, model.head_dim, device=device, dtype=DTYPE),
        "cos_sin_cache": rope_table(tokens, model.head_dim, device),
    }


def scores(ops: Any, i: kit.Inputs, first: int, reduction: str) -> Tensor:
    """Attention of the newest tokens to all from `first` on, one row a layer."""
    result = ops.score_tokens(
        i["q"],
        i["k"][:, first:],
        positions=i["position"][:, : i["k"].shape[1] - first],
        cos_sin_cache=i["cos_sin_cache"],
        reduction=reduction,
    )
    return result.expand(i["k"].shape[0], -1)


def vision_sink(ops: Any, i: kit.Inputs, model: Model, reduction: str) -> list[Tensor]:
    score = scores(ops, i, 0, reduction).clone()
    score[:, model.full - model.clip(RECENT) :] = torch.inf
    indices, _ = ops.select_tokens(score, model.budget, scatter_ratio=0.5)
    return finish(ops, indices, ops.compact_tokens([i[name] for name in TENSORS], indices))


def similarity(ops: Any, i: kit.Inputs, model: Model, shared: bool) -> list[Tensor]:
    indices, k, v = ops.evict_similar(
        i["k"],
        i["v"],
        i["slot"],
        model.budget,
        num_recent_frames=model.budget // 4 // model.tokens_per_frame,
        tokens_per_frame=model.tokens_per_frame,
        shared=shared,
    )
    return finish(ops, indices, [k, v, *ops.compact_tokens([i[name] for name in FACTS], indices)])


def clip_merge(ops: Any, i: kit.Inputs, model: Model, reduction: str) -> list[Tensor]:
    """Of the frames that were newest before, and this clip's but its newest: the best tokens and one mean a frame."""
    layers, device, per_frame = model.num_layers, i["k"].device, model.tokens_per_frame
    newest = model.clip(RECENT)
    start, stop = model.budget - newest, model.full - newest
    count, num_frames = stop - start, (stop - start) // per_frame
    score = scores(ops, i, start, reduction)[:, :count]
    kept, _ = ops.select_tokens(score, round(KEEP_RATIO * count))
    clip = [i[name][:, start:stop] for name in TENSORS]
    frame = torch.arange(count, dtype=torch.int32, device=device) // per_frame
    k, v, size = ops.merge_tokens(
        clip[0], clip[1], groups=frame.expand(layers, -1), num_groups=num_frames, sizes=clip[6]
    )
    first = [fact[:, ::per_frame] for fact in clip[2:6]]
    merged = [k, v, first[0], first[1], torch.full_like(first[2], -1), first[3], size]
    # A frame's merged token stands before those of its tokens that are kept.
    token = torch.arange(count, device=device)
    order = torch.cat((torch.arange(num_frames, device=device) * (per_frame + 1), token + token // per_frame + 1))
    chosen = torch.cat((torch.arange(num_frames, device=device).expand(layers, -1), kept.long() + num_frames), 1)
    chosen = chosen.gather(1, order[chosen].argsort(1))
    parts = [baselines.take(torch.cat((a, b), 1), chosen) for a, b in zip(merged, clip, strict=True)]
    # First in, first out: as many of the oldest tokens leave.
    leaving = parts[0].shape[1]
    rest = torch.arange(leaving, start, dtype=torch.int32, device=device).repeat(layers, 1)
    old = ops.compact_tokens([i[name][:, :start] for name in TENSORS], rest)
    whole = ops.join(i, [[a, b, i[name][:, stop:]] for a, b, name in zip(old, parts, TENSORS, strict=True)])
    return finish(ops, kept, whole)


def finish(ops: Any, indices: Tensor, kept: list[Tensor]) -> list[Tensor]:
    """What was chosen, what the memory holds now, and its summaries."""
    return [indices, *kept, ops.summarize_blocks(kept[0], block_size=BLOCK_SIZE)]


# ---------------------------------------------------------------- the ops of a backend, and by hand
def library(backend: str) -> SimpleNamespace:
    """The ops with one backend; those in place return what they wrote."""

    def compact_tokens(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
        livevlm_kernels.compact_tokens(tensors, indices, backend=backend)
        return [t[:, : indices.shape[-1]] for t in tensors]

    def evict_similar(k: Tensor, v: Tensor, slots: Tensor, budget: int, **options: Any) -> tuple[Tensor, ...]:
        indices, _ = livevlm_kernels.evict_similar(k, v, slots, budget, **options, backend=backend)
        return indices, k[:, :budget], v[:, :budget]

    def join(i: kit.Inputs, groups: list[list[Tensor]]) -> list[Tensor]:
        """The oldest are in their place already; the others are written behind them."""
        result = []
        for name, (old, parts, newest) in zip(TENSORS, groups, strict=True):
            start, stop = old.shape[1], old.shape[1] + parts.shape[1]
            i[name][:, start:stop] = parts
            i[name][:, stop : stop + newest.shape[1]] = newest
            result.append(i[name][:, : stop + newest.shape[1]])
        return result

    ops = {op: partial(getattr(livevlm_kernels, op), backend=backend) for op in OPS}
    return SimpleNamespace(**ops | {"compact_tokens": compact_tokens, "evict_similar": evict_similar, "join": join})


EAGER = SimpleNamespace(
    score_tokens=baselines.score_tokens,
    select_tokens=baselines.select_tokens,
    compact_tokens=baselines.compact_tokens,
    evict_similar=baselines.evict_similar,
    merge_tokens=lambda k, v, groups, num_groups, sizes: baselines.merge_frames(k, v, num_groups, sizes),
    summarize_blocks=baselines.summarize_blocks,
    join=lambda i, groups: [torch.cat(group, 1) for group in groups],
)


def check(result: list[Tensor], expected: list[Tensor]) -> None:
    """Rounding decides between tokens that score nearly the same: 95 % must be chosen by both, and facts must match."""
    for mine, other in zip(result[0], expected[0], strict=True):
        share = torch.isin(mine, other).float().mean().item()
        assert share >= 0.95, f"{share:.1%} of the chosen tokens are those of the reference"
    _, k, v, position, *_, summary = result
    assert bool((position.diff() >= 0).all()), "not in the order of the stream"
    for layer in range(k.shape[0]):
        mine, other = position[layer], expected[3][layer]
        once = [(x.diff(prepend=x[:1] - 1) > 0) & (x.diff(append=x[-1:] + 1) > 0) for x in (mine, other)]  # not merged
        common, match = torch.isin(mine, other[once[1]]) & once[0], torch.isin(other, mine[once[0]]) & once[1]
        assert common.sum() >= 0.9 * common.numel()
        for x, y in ((k, expected[1]), (v, expected[2])):
            # Almost all of these are moved bit by bit; a frame's mean may be rounded to the next value.
            torch.testing.assert_close(x[layer, common], y[layer, match], rtol=2**-7, atol=2**-12)
    again = baselines.summarize_blocks(k, block_size=BLOCK_SIZE)
    torch.testing.assert_close(summary, again, rtol=1e-5, atol=1e-5)


def providers(policy: Any, model: Model, scope: Any, device: str) -> dict[str, kit.Provider]:
    """Backends that every op has; "auto" if the best backend of each op is not one of these."""
    able = [livevlm_kernels.backends(op, device) for op in OPS]
    names = [name for name in kit.BACKENDS if all(name in each for each in able)]
    if any(each[0] != names[0] for each in able):
        names.insert(0, "auto")
    table = {"reference": library("reference"), "eager": EAGER} | {name: library(name) for name in names}
    return {name: partial(lambda ops, i: policy(ops, i, model, scope), ops) for name, ops in table.items()}


def main() -> None:
    options = kit.arguments(__doc__)
    device = options.device
    with kit.Bench("compression", device, options.results) as bench:
        for model in models(device):
            # Bytes that must move: the keys that are scored, and for similarity the values; what is kept, read and
            # written; the summaries.
            facts = 2 * sum(dtype.itemsize for dtype in FACTS.values()) * model.num_layers * model.budget
            summaries = 2 * model.kv_bytes(-(-model.budget // BLOCK_SIZE))
            kept = 4 * model.kv_bytes(model.budget) + facts + summaries
            new = round(KEEP_RATIO * model.clip(32)) + 32 + model.clip(RECENT)  # of clip_merge; these are in the clip
            old = model.kv_bytes(model.budget - new)
            merge = 2 * (model.kv_bytes(model.clip(32 + RECENT)) + old) + kept - 2 * model.kv_bytes(model.budget)
            evict = 2 * model.kv_bytes(model.full + model.budget) + facts + summaries
            cases = [
                ("vision_sink layer", vision_sink, "layer", model.kv_bytes(model.full) + kept),
                ("vision_sink shared", vision_sink, "shared", model.kv_bytes(model.full) + kept),
                ("similarity layer", similarity, False, evict),
                ("similarity shared", similarity, True, evict),
                ("clip_merge layer", clip_merge, "layer", merge),
            ]  # fmt: skip
            encode = ENCODE_MS.get(model.name)
            for name, policy, scope, moved in cases:
                bench.run(
                    f"{model.text(model.full)} keep {model.budget} {name}",
                    DTYPE,
                    lambda model=model: make(model, device),
                    moved,
                    providers(policy, model, scope, device),
                    check=check,
                    in_place=True,
                    columns=lambda us, ms=encode: {"percent_of_encode": round(us / ms / 10, 3)} if ms else {},
                )


if __name__ == "__main__":
    main()
