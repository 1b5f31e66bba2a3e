# SPDX-License-Identifier: Apache-2.0
"""Reads clips into a LiveCache, as CUDA graphs where they repeat themselves.

A clip of one frame keeps a GPU busy for less time than Python takes for its thousand launches. Two clips of the same
number of frames make the same launches, down to their addresses: what differs (pixels, times, where in the memory and
in the stream they stand) is read from tensors. So the third such clip is captured, from pixels to keys and values, and
from then on replayed: it is what `read_clip` launches, kernel for kernel, so results are the same bits. A clip writes
behind the memory's end and nowhere else; compressing the memory, once in a while, is no part of it.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from livevlm.attention import angles_for, backend_for
from livevlm.clip_pass import NUM_PLACES, facts_of, read_clip
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
    """A clip's launches, and the tensors that they take it from."""

    replay: Callable[[], None]
    frames: Tensor
    facts: Tensor


class ClipReader:
    """Reads clips into one cache.

    Args:
        capture: False keeps the launches of a clip as they are, in the place of a graph: for tests, on any device.

    Attributes:
        num_clips, num_replayed: clips read, and how many of them by a graph.
        why_eager: why the newest clip was no replay; empty if it was.
    """

    def __init__(self, cache: LiveCache, *, capture: bool = True) -> None:
        self.cache: LiveCache = cast(Any, weakref.proxy(cache))
        self.capture = capture
        self.num_clips = self.num_replayed = 0
        self.why_eager = "no clip was read yet"
        self._failed = ""
        self._layers: Layers | None = None
        self._unknown = ""  # why there are none
        self._vision: Vision | None = None
        self._under_way: deque[torch.cuda.Event] = deque()
        self.forget()

    def forget(self) -> None:
        """Lets go of all graphs: something they refer to is gone."""
        self._moved = (0, 0)
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Captured] = {}

    def read(self, frames: Tensor, times: Tensor, normalise: Normalise) -> None:
        """A clip on the model's device, into slots behind the memory's end; see `LiveCache.push_unchecked`.

        Its tokens are provisional then, also after a failure.
        """
        cache, num_tokens = self.cache, frames.shape[0] * self.cache.adapter.tokens_per_frame
        facts = facts_of(cache, times)
        if frames.is_cuda:
            facts = facts.pin_memory()  # a copy from pinned memory does not wait for the GPU
        while len(self._under_way) > MOST_AHEAD:
            self._under_way.popleft().synchronize()
        cache.memory.reserve(num_tokens)  # a graph can't
        captured = self._captured(frames, normalise)
        where = cache.memory.open(num_tokens)
        if captured is None:
            read_clip(cache, frames, facts.to(frames.device, non_blocking=True), where, normalise)
        else:
            captured.frames.copy_(frames)
            captured.facts.copy_(facts, non_blocking=True)
            captured.replay()
            self.num_replayed += 1
        cache.queries.expect(num_tokens)
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
        angles = angles_for(cache.config, memory, cache.rope, self._last_position(frames))
        if (memory.version, angles.data_ptr()) != self._moved:
            self.forget()
            self._moved = (memory.version, angles.data_ptr())
        key = (frames.shape[0], frames.dtype, normalise)
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] <= WARM_CLIPS:
                self.why_eager = "too few clips like this one yet"
                return None
            self._capture(key, frames, normalise)
        captured = self._graphs.get(key)
        if captured is None:
            self.why_eager = self._failed
        return captured

    def _last_position(self, frames: Tensor) -> int:
        return self.cache.num_stream_tokens + frames.shape[0] * self.cache.adapter.tokens_per_frame

    def _why_not(self, frames: Tensor) -> str:
        config, shape, last = self.cache.config, self.cache.memory.shape, self._last_position(frames)
        in_place = backend_for(config, shape, last - self.cache.num_stream_tokens, last) is not None
        reasons = (
            (self.capture and not frames.is_cuda, "CUDA graphs need a GPU"),
            (config.graphs == "off", "graphs='off'"),
            (frames.shape[0] > MOST_FRAMES, f"a clip of more than {MOST_FRAMES} frames"),
            (bool(self._unknown), self._unknown),
            (not in_place, "the memory is not read in place: see Config.attention"),
            (bool(self._failed), self._failed),
        )
        return next((why for applies, why in reasons if applies), "")

    # ---------------------------------------------------------------- capturing
    def _capture(self, key: Hashable, frames: Tensor, normalise: Normalise) -> None:
        """Captures a clip. Nothing runs on the GPU meanwhile, so the memory's content stays what it was."""
        cache, memory = self.cache, self.cache.memory
        static = torch.empty_like(frames, memory_format=torch.contiguous_format)
        facts = torch.empty(NUM_PLACES + frames.shape[0], dtype=torch.float64, device=frames.device)
        where = memory.open(frames.shape[0] * cache.adapter.tokens_per_frame)
        launch = partial(read_clip, cache, static, facts, where, normalise)
        try:
            self._graphs[key] = _Captured(self._recorded(launch) if self.capture else launch, static, facts)
        except Exception as error:
            if cache.config.graphs == "on":
                raise
            said = (str(error).strip() or "no message").splitlines()[0]
            self._failed = f"a clip could not be captured: {type(error).__name__}: {said}"
        finally:
            memory.end = where.start

    def _recorded(self, launch: Callable[[], None]) -> Callable[[], None]:
        graph, shape, pool = torch.cuda.CUDAGraph(), self.cache.memory.shape, self.cache.graph_pool
        side = capture_stream(shape.device)
        # Other threads may use the GPU, to bring frames there: only this one's mistakes end the capture.
        capture = torch.cuda.graph(graph, pool=pool.handle(), stream=side, capture_error_mode="thread_local")
        with capturing(shape.device):
            _set_up(side, shape.dtype)
            with capture:
                launch()
        pool.add(graph)
        return graph.replay


def _set_up(stream: torch.cuda.Stream, dtype: torch.dtype) -> None:
    """Makes the handles and workspaces of cuBLAS and cuDNN that this thread uses on a stream; a capture cannot."""
    with torch.cuda.stream(stream):
        x = torch.zeros((16, 16), dtype=dtype, device=stream.device)
        torch.addmm(x[0], x, x)
        F.conv2d(x[None, None], x[None, None])
