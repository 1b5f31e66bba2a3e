# SPDX-License-Identifier: Apache-2.0
"""What is measured. Each part gives its rows; one that runs out of time or memory says so in a row and ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch

from livevlm.benchmark import timing
from livevlm.benchmark.asking import questions
from livevlm.benchmark.files import file
from livevlm.benchmark.live import CLIP, Live
from livevlm.benchmark.profiling import profile
from livevlm.benchmark.report import Row, row
from livevlm.benchmark.stock import Stock
from livevlm.benchmark.subject import Subject
from livevlm.benchmark.timing import Limit
from livevlm.types import RetrievalName

CALLS = (1, 8, 32)
SHARE = 0.4  # of the memory that is retrieved (LiveVLM v2)


@dataclass(frozen=True)
class Plan:
    """Attributes:
    frames: length of the longest stream.
    calls: frames a call, where encoding is measured.
    repeats: samples of each figure.
    settings: of livevlm's stream, beyond the checkpoint's.
    """

    frames: int
    calls: Sequence[int] = CALLS
    repeats: int = 10
    settings: tuple[tuple[str, object], ...] = ()

    @property
    def histories(self) -> list[int]:
        """Frames of history at which questions are asked: 16, 64, 256 ... and the whole stream."""
        points = [16 * 4**i for i in range(12) if 16 * 4**i < self.frames]
        return [*points, self.frames]


Part = Callable[[Subject, Plan, Limit], Iterator[Row]]


def _memory(part: str, system: str, history: int, device: torch.device) -> Iterator[Row]:
    sizes = {**timing.gpu_bytes(device), "host": timing.host_bytes()}
    for name, size in sizes.items():
        if size is not None:
            yield row(part, system, f"{name} GB", [size / 1e9], history=history)


def _ended(part: str, system: str, metric: str, history: int, why: str) -> Row:
    return Row(part, system, metric, history, None, None, samples=0, note=why)


def _live(subject: Subject, plan: Plan, **settings: object) -> Live:
    return Live(subject, **{**settings, **dict(plan.settings)})


def encode(subject: Subject, plan: Plan, limit: Limit) -> Iterator[Row]:
    """Reading frames, so many a call, with as much in memory as livevlm keeps."""
    device, size = subject.device, subject.model.config.vision_config.image_size
    one = _live(subject, plan)
    history = min(plan.frames, one.stream.cache.budget // one.stream.cache.adapter.tokens_per_frame + 1)
    one.watch(history, CLIP)

    def pushed(count: int, calls: int) -> float:
        taken = [timing.milliseconds(partial(one.push, count), device) for _ in range(calls)]
        return sum(taken) / (calls * count)

    for count in plan.calls:
        calls = one.cycle(count)
        samples = timing.sampled(partial(pushed, count, calls), plan.repeats, limit, warm=max(1, 4 // calls))
        why = one.stream.stats().why_eager
        note = f"{f'eager: {why}' if why else 'replayed'}; one compression in {calls} calls"
        yield row("encode", "livevlm", "encode ms/frame", samples, history=history, frames=count, note=note)
    stock = Stock(subject)
    pixels = torch.randn(max(plan.calls), 3, size, size, device=device, dtype=subject.model.dtype)
    for first in range(0, history, CLIP):
        stock.push(pixels[: min(CLIP, history - first)])

    def pushed_and_taken_back(count: int) -> float:
        before = stock.cache.get_seq_length()
        taken = timing.milliseconds(partial(stock.push, pixels[:count]), device) / count
        stock.cache.crop(before - stock.cache.get_seq_length())
        return taken

    for count in plan.calls:
        samples = timing.sampled(partial(pushed_and_taken_back, count), plan.repeats, limit)
        yield row("encode", "stock", "encode ms/frame", samples, history=history, frames=count)


def live(subject: Subject, plan: Plan, limit: Limit) -> Iterator[Row]:
    """A stream that is really read to its end, with questions on the way."""
    device = subject.device
    one, seen = _live(subject, plan, clip_frames=2 * CLIP), 0  # compressed after two clips, with room for no more
    for history in plan.histories:
        taken = timing.milliseconds(partial(one.watch, history - seen, CLIP), device) / (history - seen)
        yield row("live", "livevlm", "encode ms/frame", [taken], history=history, frames=CLIP)
        yield from questions("live", "livevlm", one.ask, history, plan.repeats, limit)
        yield from _memory("live", "livevlm", history, device)
        seen = history
        if limit.passed and history < plan.frames:
            yield _ended("live", "livevlm", "TTFT ms", history, f"{limit.seconds:.0f} s are over")
            return


def retrieval(subject: Subject, plan: Plan, limit: Limit) -> Iterator[Row]:
    """Questions to a full memory, by what they attend to: all of it, or the best 40 % by each way of retrieval."""
    cache = _live(subject, plan).stream.cache
    frames = cache.budget // cache.adapter.tokens_per_frame
    share = {"retrieval_ratio": SHARE, "num_retrieved_frames": math.ceil(SHARE * frames)}
    for way in get_args(RetrievalName):
        timing.free(subject.device)
        one = Live(subject, **{**dict(plan.settings), **share, "retrieval": way})
        one.watch(frames + CLIP, CLIP)
        for found in questions("retrieval", "livevlm", one.ask, one.num_frames, plan.repeats, limit):
            yield dataclasses.replace(found, note="all of the memory" if way == "none" else f"{way}, {SHARE:.0%}")


def kept(subject: Subject, plan: Plan, limit: Limit) -> Iterator[Row]:
    """Stock transformers over a stream, everything kept, until it is out of memory or time."""
    device, size = subject.device, subject.model.config.vision_config.image_size
    stock, seen = Stock(subject), 0
    pixels = torch.randn(CLIP, 3, size, size, device=device, dtype=subject.model.dtype)
    for history in plan.histories:
        taken = []
        try:
            while seen < history and not limit.passed:
                count = min(CLIP, history - seen)
                taken.append(timing.milliseconds(partial(stock.push, pixels[:count]), device) / count)
                seen += count
            if seen == history:
                yield row("kept", "stock", "encode ms/frame", taken[-100:], history=history, frames=CLIP)
                yield from questions("kept", "stock", stock.ask, history, plan.repeats, limit)
                yield from _memory("kept", "stock", history, device)
        except torch.OutOfMemoryError:
            yield _ended("kept", "stock", "TTFT ms", seen, f"out of memory after {seen} frames")
            return
        if limit.passed:
            yield _ended("kept", "stock", "TTFT ms", seen, f"{limit.seconds:.0f} s are over after {seen} frames")
            return


def oneshot(subject: Subject, plan: Plan, limit: Limit) -> Iterator[Row]:
    """Stock transformers reading the whole video with every question, until it is out of memory or time."""
    device, size, system = subject.device, subject.model.config.vision_config.image_size, "stock one-shot"
    counts = [count for i in range(12) if (count := 16 * 2**i) < plan.frames]
    for count in [*counts, plan.frames]:
        timing.free(device)
        try:
            pixels = torch.randn(count, 3, size, size, device=device, dtype=subject.model.dtype)
            stock = Stock(subject)
            few = min(3, plan.repeats)  # each takes seconds
            ask = partial(stock.ask_at_once, pixels)
            yield from questions("oneshot", system, ask, count, few, limit, warm=1)
            yield from _memory("oneshot", system, count, device)
        except torch.OutOfMemoryError:
            yield _ended("oneshot", system, "TTFT ms", count, f"out of memory with {count} frames")
            return
        if limit.passed:
            yield _ended("oneshot", system, "TTFT ms", count, f"{limit.seconds:.0f} s are over")
            return


def floor(subject: Subject, plan: Plan, limit: Limit) -> Iterator[Row]:
    """One read of the language model's weights, at the speed of a copy: nothing decodes a token faster."""
    speed = timing.copy_bandwidth(subject.device)
    note = f"{subject.weight_bytes / 1e9:.2f} GB at {speed / 1e9:.0f} GB/s"
    yield row("floor", "floor", "decode ms/token", [subject.weight_bytes / speed * 1e3], note=note)


PARTS: dict[str, Part] = {
    "floor": floor, "encode": encode, "live": live, "retrieval": retrieval, "kept": kept, "oneshot": oneshot,
    "file": file, "profile": profile,
}  # fmt: skip
