# SPDX-License-Identifier: Apache-2.0
"""Reads clips into a LiveCache, as CUDA graphs where they repeat themselves.

A clip of one frame keeps a GPU busy for less time than Python takes for its thousand launches. Two clips of the same
number of frames make the same launches, down to their addresses: what differs (pixels, times, where in the memory and
in the stream they stand) is read from tensors. So the third such clip is captured, from pixels to keys and values, and
from then on replayed: it is what `see` and `keep` launch, kernel for kernel, so results are the same bits. A clip
writes behind the memory's end and nowhere else; compressing the memory, once in a while, is no part of it.

It is two graphs, so that the GPU sees while the host still makes sure that the language model is what it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import proxy

import torch
from torch import Tensor

from livevlm.attention import angles_for, backend_for
from livevlm.clip_pass import facts_of, keep, see
from livevlm.errors import ModelError
from livevlm.layers import Layers
from livevlm.repeated import Launches, Repeated

if TYPE_CHECKING:
    from livevlm.cache import LiveCache

MOST_FRAMES = 8  # a clip of more keeps the GPU busy for longer than launching takes; its graph would cost memory
MOST_AHEAD = 1  # clips on the GPU before the one that is given to it: what is queued there, a question waits for

Normalise = Callable[[Tensor], Tensor] | None


class ClipReader:
    """Reads clips into one cache.

    Args:
        capture: False keeps the launches of a clip as they are, in the place of a graph: for tests, on any device.

    Attributes:
        num_clips, num_replayed: clips read, and how many of them by graphs.
        why_eager: why the newest clip was no replay; empty if it was.
    """

    def __init__(self, cache: LiveCache, *, capture: bool = True) -> None:
        self.cache: LiveCache = cast(Any, proxy(cache))
        self.capture = capture
        self.num_clips = self.num_replayed = 0
        self.why_eager = "no clip was read yet"
        self.seeing, self.keeping = (Repeated(cache.graph_pool, capture) for _ in range(2))
        self._layers: Layers | None = None
        self._unknown = ""  # why there are none
        self._embeds = torch.empty(0)  # from one graph to the other
        self._under_way: deque[torch.cuda.Event] = deque()

    def forget(self) -> None:
        """Lets go of graphs that refer to the cache's memory."""
        self.keeping.forget()

    def read(self, frames: Tensor, times: Tensor, normalise: Normalise) -> None:
        """A clip on the model's device, into slots behind the memory's end; see `LiveCache.push_unchecked`.

        Its tokens are provisional then, also after a failure.
        """
        memory, num_tokens = self.cache.memory, frames.shape[0] * self.cache.adapter.tokens_per_frame
        while len(self._under_way) > MOST_AHEAD:
            self._under_way.popleft().synchronize()
        why = self._why_not(frames)
        embeds, why_seen = self._see(frames.contiguous(), normalise, why)
        facts = facts_of(self.cache, times)
        if frames.is_cuda:
            facts = facts.pin_memory()  # a copy from pinned memory does not wait for the GPU
        memory.reserve(num_tokens)  # a graph can't
        where = memory.open(num_tokens)
        why_kept = self._keep(embeds, facts, where, why)
        self.cache.queries.expect(memory.v[:, where])
        if frames.is_cuda:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(frames.device))
            self._under_way.append(done)
        self.why_eager = why_seen or why_kept
        self.num_clips += 1
        self.num_replayed += not self.why_eager

    def layers(self) -> Layers | None:
        """The language model's layers if they can be used one by one; None if only the whole model may be called."""
        if self._layers is None or not self._layers.unchanged():
            try:
                self._layers, self._unknown = Layers(self.cache.adapter), ""
            except ModelError as error:
                self._layers, self._unknown = None, str(error)
        return self._layers

    def _why_not(self, frames: Tensor) -> str:
        """Why nothing is replayed for a clip like this; empty if something may be."""
        reasons = (
            (self.capture and not frames.is_cuda, "CUDA graphs need a GPU"),
            (self.cache.config.graphs == "off", "graphs='off'"),
            (frames.shape[0] > MOST_FRAMES, f"a clip of more than {MOST_FRAMES} frames"),
        )
        return next((why for applies, why in reasons if applies), "")

    @property
    def _strict(self) -> bool:
        return self.cache.config.graphs == "on"

    # ---------------------------------------------------------------- from pixels to embeddings
    def _see(self, frames: Tensor, normalise: Normalise, why: str) -> tuple[Tensor, str]:
        """Embeddings of a clip, `[num_tokens, hidden]`, there until the next one is seen; and why by no replay.

        Args:
            why: by no replay in any case.
        """
        cache, vision = self.cache, self.cache.adapter.vision()
        self.seeing.refer_to(vision)  # another one where it has moved, was converted or hooked
        captured, why = None, why or vision.hooked
        if not why:

            def make() -> Launches:
                pixels, out = torch.empty_like(frames), self._room(frames.shape[0], frames.device)
                return lambda: out.copy_(see(cache, pixels, normalise)), (pixels, out)

            captured, why = self.seeing.find((frames.shape, frames.dtype, normalise), make, strict=self._strict)
        if captured is None:
            return see(cache, frames, normalise), why
        pixels, out = captured.inputs
        pixels.copy_(frames)
        captured.replay()
        return out, ""

    def _room(self, num_frames: int, device: torch.device) -> Tensor:
        """Where embeddings of so many frames go from one graph to the other."""
        adapter = self.cache.adapter
        shape = (MOST_FRAMES * adapter.tokens_per_frame, adapter.language_model.config.hidden_size)
        if (self._embeds.shape, self._embeds.dtype, self._embeds.device) != (shape, adapter.dtype, device):
            with torch.inference_mode(False):  # made in inference mode, it could not be written outside of it
                self._embeds = torch.empty(shape, dtype=adapter.dtype, device=device)
        return self._embeds[: num_frames * adapter.tokens_per_frame]

    # ---------------------------------------------------------------- from embeddings to keys and values
    def _keep(self, embeds: Tensor, facts: Tensor, where: slice, why: str) -> str:
        """Into slots of the memory; why by no replay.

        Args:
            facts: `facts_of` the clip, on the host.
            why: by no replay in any case.
        """
        cache, layers, captured = self.cache, self.layers(), None
        num_tokens, last = where.stop - where.start, cache.next_position + where.stop - where.start
        why = why or self._unknown
        if not why and backend_for(cache.config, cache.memory.shape, num_tokens, last) is None:
            why = "the memory is not read in place: see Config.attention"
        if not why:
            angles = angles_for(cache.config, cache.memory, cache.rope, last)
            room = self._room(num_tokens // cache.adapter.tokens_per_frame, embeds.device)
            self.keeping.refer_to(layers, cache.memory.version, angles.data_ptr(), room.data_ptr())

            def make() -> Launches:
                static = torch.empty(facts.shape, dtype=facts.dtype, device=embeds.device)
                return partial(keep, cache, room, static, where), (static, room)

            captured, why = self.keeping.find(num_tokens, make, strict=self._strict)
        if captured is None:
            keep(cache, embeds, facts.to(embeds.device, non_blocking=True), where)
            return why
        static, room = captured.inputs
        static.copy_(facts, non_blocking=True)
        if room.data_ptr() != embeds.data_ptr():
            room.copy_(embeds)
        captured.replay()
        return ""
