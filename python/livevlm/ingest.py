# SPDX-License-Identifier: Apache-2.0
"""Reads clips into a LiveCache, as CUDA graphs where they repeat themselves.

A clip of one frame costs a GPU a few milliseconds and Python thirty, for a thousand launches. Once a bounded memory is
full, every clip of the same number of frames starts at the same slot, attends to as many keys and is compressed to
the same length: the launches are the same, down to their addresses. What does differ (pixels, times, place in the
stream) is read from tensors. So the third such clip is captured, whole, from pixels to the compressed memory, and from
then on replayed. It is what `LiveCache.read_clip` launches, kernel for kernel, so its results are the same bits.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from livevlm.errors import ModelError
from livevlm.layers import Layers
from livevlm.replay import capture_stream, capturing

if TYPE_CHECKING:
    from livevlm.cache import LiveCache
    from livevlm.models.vision import Vision

MOST_FRAMES = 8  # a clip of more keeps the GPU busy for longer than launching takes; its graph would cost memory
MOST_AHEAD = 1  # clips on the GPU before the one that is given to it: what is queued there, a question waits for
WARM_CLIPS = 2  # of a kind, read eagerly first: libraries load their kernels and choose algorithms

Normalise = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class _Captured:
    """A clip's launches, the tensors they take it from, and what they use that others might let go of."""

    graph: torch.cuda.CUDAGraph
    frames: Tensor
    facts: Tensor
    held: tuple[object, ...]


class ClipReader:
    """Reads clips into one cache.

    Attributes:
        num_clips, num_replayed: clips read, and how many of them by a graph.
        why_eager: why the newest clip was no replay; empty if it was.
    """

    def __init__(self, cache: LiveCache) -> None:
        self.cache: LiveCache = cast(Any, weakref.proxy(cache))
        self.num_clips = self.num_replayed = 0
        self.why_eager = "no clip was read yet"
        self._failed = ""
        self._layers: Layers | None = None
        self._unknown = ""  # why there are none
        self._vision: Vision | None = None
        self._under_way: deque[torch.cuda.Event] = deque()
        self.forget()

    def forget(self) -> None:
        """Lets go of all graphs: the memory they write to is gone."""
        self._version = 0
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Captured] = {}
        self._pool: Any = None  # of GPU memory, for the graphs of all sizes: only one of them runs at a time

    def read(self, frames: Tensor, times: Tensor, normalise: Normalise) -> None:
        """A clip on the model's device; see `LiveCache.push_unchecked`. A failure leaves no trace."""
        cache = self.cache
        start = torch.tensor([cache.num_stream_tokens, cache.num_frames], dtype=torch.float64)
        facts = torch.cat((start, times))
        if frames.is_cuda:
            facts = facts.pin_memory()  # a copy from pinned memory does not wait for the GPU
        while len(self._under_way) > MOST_AHEAD:
            self._under_way.popleft().synchronize()
        captured = self._captured(frames, normalise)
        if captured is None:
            cache.read_clip(frames, facts.to(frames.device, non_blocking=True), normalise)
        else:
            captured.frames.copy_(frames)
            captured.facts.copy_(facts, non_blocking=True)
            captured.graph.replay()
            self.num_replayed += 1
        if frames.is_cuda:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(frames.device))
            self._under_way.append(done)
        self.num_clips += 1

    def layers(self) -> Layers | None:
        """The language model's layers if they can be used one by one; None if only the whole model may be called."""
        if self._layers is None or not self._layers.unchanged():
            self.forget()
            try:
                self._layers, self._unknown = Layers(self.cache.adapter), ""
            except ModelError as error:
                self._layers, self._unknown = None, str(error)
        return self._layers

    # ---------------------------------------------------------------- which clips
    def _captured(self, frames: Tensor, normalise: Normalise) -> _Captured | None:
        """The graph for a clip like this, or None to read it eagerly."""
        self.layers()
        cache, memory = self.cache, self.cache.memory
        vision = cache.adapter.vision()
        if vision is not self._vision:  # moved, converted, hooked: graphs hold its addresses
            self.forget()
            self._vision = vision
        self.why_eager = self._why_not(frames) or vision.hooked
        if self.why_eager:
            return None
        if memory.version != self._version:
            self.forget()
            self._version = memory.version
        where = (memory.video_start, memory.end, cache.queries.count)
        key = (frames.shape[0], frames.dtype, normalise, where)
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] <= WARM_CLIPS:
                self.why_eager = "too few clips like this one yet"
                return None
            self._capture(key, frames, normalise)
        captured = self._graphs.get(key)
        if captured is None:
            self.why_eager = self._failed or "the memory is not full yet"
        return captured

    def _why_not(self, frames: Tensor) -> str:
        config, failed = self.cache.config, self._failed
        reasons = (
            (not frames.is_cuda, "CUDA graphs need a GPU"),
            (config.graphs == "off", "graphs='off'"),
            (self.cache.policy.unbounded, f"policy {config.policy!r}: no two clips attend to as many keys"),
            (config.positions == "original", "positions='original': no two clips have the same ones"),
            (frames.shape[0] > MOST_FRAMES, f"a clip of more than {MOST_FRAMES} frames"),
            (bool(self._unknown), self._unknown),
            (bool(failed), failed),
        )
        return next((why for applies, why in reasons if applies), "")

    # ---------------------------------------------------------------- capturing
    def _capture(self, key: Hashable, frames: Tensor, normalise: Normalise) -> None:
        """Captures a clip. Nothing runs on the GPU meanwhile, so the memory's content stays what it was."""
        cache, memory, queries = self.cache, self.cache.memory, self.cache.queries
        before = (memory.video_end, memory.end, queries.count)
        graph = torch.cuda.CUDAGraph()
        static = torch.empty_like(frames, memory_format=torch.contiguous_format)
        facts = torch.empty(2 + frames.shape[0], dtype=torch.float64, device=frames.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stays = (*before[:2], queries.count)
        try:
            # Other threads may use the GPU, to bring frames there: only this one's mistakes end the capture.
            side = capture_stream(frames.device)
            capture = torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local")
            with capturing(frames.device):
                _set_up(side, memory.shape.dtype)
                with capture:
                    cache.read_clip(static, facts, normalise)
            stays = (memory.video_end, memory.end, queries.count)
        except Exception as error:
            if cache.config.graphs == "on":
                raise
            said = (str(error).strip() or "no message").splitlines()[0]
            self._failed = f"a clip could not be captured: {type(error).__name__}: {said}"
        finally:
            memory.undo_capture(*before[:2])
            queries.rollback()
            queries.count = before[2]
        if not self._failed and stays == before:  # else the next clip would be no repetition
            self._graphs[key] = _Captured(graph, static, facts, (memory.tensors, queries.q))


def _set_up(stream: torch.cuda.Stream, dtype: torch.dtype) -> None:
    """Makes the handles and workspaces of cuBLAS and cuDNN that this thread uses on a stream; a capture cannot."""
    with torch.cuda.stream(stream):
        x = torch.zeros((16, 16), dtype=dtype, device=stream.device)
        torch.addmm(x[0], x, x)
        F.conv2d(x[None, None], x[None, None])
