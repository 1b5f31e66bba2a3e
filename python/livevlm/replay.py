# SPDX-License-Identifier: Apache-2.0
"""Forward passes over static buffers, captured into CUDA graphs: a question's in buckets of length, and one token's.

Graphs hold addresses. They are captured when they are first needed, or by `warmup`, and captured anew when the memory,
its summaries, the table of angles or the model's weights have moved.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from livevlm.attention import MOST_ANGLES, angles_for
from livevlm.buffers import BUCKETS, Buffers, Choice, Place
from livevlm.decoder import Decoder, State
from livevlm.errors import ModelError
from livevlm.layers import Layers

if TYPE_CHECKING:
    from livevlm.cache import LiveCache

Kind = tuple[int, bool]  # rows of a pass, and whether they choose the blocks that are attended to
TOKEN: Kind = (1, False)

_CAPTURING = threading.Lock()
_SIDE: dict[torch.device, torch.cuda.Stream] = {}


class Replay:
    """The passes of one LiveCache.

    Args:
        capture: False runs the same passes as they are: for tests, on any device.

    Attributes:
        said: how the newest answer ran: "on", "off: why", or "failed: why".
    """

    def __init__(self, cache: LiveCache, *, capture: bool = True) -> None:
        self.cache: LiveCache = cast(
            Any, weakref.proxy(cache)
        )  # no cycle: a cache that nobody has lets go of its GPU memory
        self.capture = capture
        self.buffers: Buffers | None = None
        self._decoder: Decoder | None = None
        self._layers: Layers | None = None
        self._moved: tuple[Any, ...] = ()  # where everything was when the graphs were captured
        self._failed: str | None = None
        self._graphs: dict[Kind, list[torch.cuda.CUDAGraph]] = {}
        reason = self.refusal()
        self.said = "on" if reason is None else f"off: {reason}"

    # ---------------------------------------------------------------- whether
    def refusal(self) -> str | None:
        """Why nothing can be captured for this model and these settings; None: it can."""
        config, shape = self.cache.config, self.cache.adapter.kv_shape()
        if config.graphs == "off":
            return "graphs='off'"
        if self.capture and shape.device.type != "cuda":
            return shape.device.type
        if config.attention == "sdpa":
            return "attention='sdpa'"
        if self.capture and config.attention == "auto" and shape.dtype.itemsize > 2:
            return str(shape.dtype).removeprefix("torch.")  # attention="auto" does not read such a memory in place
        if self._layers is None or not self._layers.first_unchanged():  # the rest: see `read_question`
            try:
                self._layers = Layers(self.cache.adapter)
            except ModelError as error:
                return str(error)
        return None

    def can_answer(self, kinds: Sequence[Kind], max_new_tokens: int) -> bool:
        """Whether these passes over a question, and its answer, can be replayed now; captures what is missing.

        Between questions only: capturing writes slots behind the memory's end. Sets `said`.
        """
        longest = max(num_tokens for num_tokens, _ in kinds)
        reason = self.refusal()
        if reason is None and longest > BUCKETS[-1]:
            reason = f"a question of {longest} tokens, more than {BUCKETS[-1]}"
        config, last_position = self.cache.config, self.cache.next_position + longest + max_new_tokens
        if reason is None and config.positions != "packed" and last_position > MOST_ANGLES:
            reason = f"positions={config.positions!r} of so long a stream"
        if reason is None and self.capture and torch.cuda.is_current_stream_capturing():
            reason = "another graph is being captured"
        if reason is not None:
            self.said = f"off: {reason}"
            return False
        self.cache.memory.reserve(BUCKETS[-1] + max_new_tokens)
        try:
            self._find(max_new_tokens)
            if self._failed is None:
                for num_tokens, retrieve in kinds:
                    self._capture((bucket_of(num_tokens), retrieve))
                self._capture(TOKEN)
        except Exception as error:
            if config.graphs == "on":
                raise
            self._graphs.clear()
            self._failed = f"{type(error).__name__}: {error}".split("\n")[0]
        self.said = "on" if self._failed is None else f"failed: {self._failed}"
        return self._failed is None

    def forget(self) -> None:
        """Drops graphs and buffers, and with them the memory that they were captured for."""
        self._graphs.clear()
        self.buffers = self._decoder = self._layers = None
        self._moved = ()

    def warmup(self, retrieve: Sequence[bool], max_new_tokens: int) -> bool:
        """Captures all graphs of these kinds; tries again after a failure."""
        self.forget()
        return self.can_answer([(bucket, each) for bucket in BUCKETS for each in retrieve], max_new_tokens)

    # ---------------------------------------------------------------- passes
    def read_question(
        self, token_ids: Tensor, start: int, first_position: int, *, after_video: bool, retrieve: bool
    ) -> bool:
        """Reads token ids `[num_tokens]`, on the host, into slots from `start` on; `logits` are then of what follows.

        The GPU begins while the host still makes sure that the later layers are what they were. If they are not, this
        gives False, and nothing but slots behind `start` was written: ask `can_answer` again.

        Args:
            first_position: in the stream.
            after_video: the newline that ends a video is read before them.
            retrieve: they choose the blocks that are attended to.
        """
        assert self._layers is not None
        rows = bucket_of(after_video + token_ids.shape[0])
        self._send(token_ids, after_video, start, first_position, rows)
        begin, finish = self._launches((rows, retrieve))
        begin()
        if not self._layers.rest_unchanged():
            self._layers = None
            return False
        finish()
        return True

    def _send(self, token_ids: Tensor, after_video: bool, start: int, first_position: int, rows: int) -> None:
        assert self.buffers is not None
        memory, retrieval, num_tokens = self.cache.memory, self.cache.retrieval, after_video + token_ids.shape[0]
        packed = self.cache.config.positions == "packed"
        candidates = selected = 0
        if retrieval.is_needed(memory):
            candidates, selected = retrieval.num_candidates(memory), retrieval.num_selected(memory)
        first, searched = memory.video_start // memory.block_size, retrieval.num_searched(candidates)
        choice = Choice(first, candidates, selected, searched)
        keys = start - (choice.candidates - choice.selected) * memory.block_size
        position = keys if packed else first_position
        place = Place(start, keys + rows, position, num_tokens)
        step = Place(start + num_tokens, keys + num_tokens + 1, position + num_tokens, 1)
        self.buffers.send(token_ids, after_video, place, step, choice)

    def read_token(self) -> None:
        """Reads `token`."""
        for launch in self._launches(TOKEN):
            launch()

    def _launches(self, kind: Kind) -> list[Callable[[], None]]:
        """Of a pass, one after the other."""
        return [graph.replay for graph in self._graphs[kind]] if self.capture else self._parts(kind)

    def _parts(self, kind: Kind) -> list[Callable[[], None]]:
        decoder, (rows, retrieve) = self._decoder, kind
        between: list[State] = []
        assert decoder is not None
        if kind == TOKEN:
            return [decoder.read_token]
        return [
            lambda: between.append(decoder.begin_question(rows, retrieve=retrieve)),
            lambda: decoder.finish_question(between.pop(), retrieve=retrieve),
        ]

    # ---------------------------------------------------------------- capturing
    def _find(self, max_new_tokens: int) -> None:
        """Makes buffers and forgets all graphs, if anything they refer to has moved."""
        cache = self.cache
        adapter, memory, shape = cache.adapter, cache.memory, cache.memory.shape
        last_position = min(cache.next_position + BUCKETS[-1] + max_new_tokens, MOST_ANGLES)
        angles = angles_for(cache.config, memory, cache.rope, last_position)
        assert self._layers is not None
        held = [memory.k, memory.v, memory.position, angles, adapter.inner.image_newline]
        if cache.config.retrieval != "none":
            held.append(cache.retrieval.searched(memory))
        moved = (self._layers, *((tensor.data_ptr(), tuple(tensor.shape)) for tensor in held))
        if moved == self._moved:
            return
        self._graphs.clear()
        self._failed = None
        vocab_size = adapter.model.lm_head.weight.shape[0]
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside of it
            self.buffers = Buffers(shape, memory.num_slots // memory.block_size, vocab_size)
        backend = "auto" if cache.config.attention == "auto" else cache.config.attention
        self._decoder = Decoder(
            adapter, self._layers, memory, cache.retrieval, cache.config, self.buffers, angles, backend
        )
        self._moved = moved

    def _capture(self, kind: Kind) -> None:
        if not self.capture or kind in self._graphs:
            return
        parts, device = self._parts(kind), self.cache.memory.shape.device
        with capturing(device):
            # Numbers that any memory allows. What is written lies behind its end.
            self._send(torch.zeros(kind[0], dtype=torch.int64), False, self.cache.memory.end, 0, kind[0])
            side = capture_stream(device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels, and lets libraries set themselves up
                for run in parts:
                    run()
            torch.cuda.current_stream().wait_stream(side)
            self._graphs[kind] = [self._recorded(run, side) for run in parts]

    def _recorded(self, run: Callable[[], None], side: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        graph, pool = torch.cuda.CUDAGraph(), self.cache.graph_pool
        # Other threads may go on using the GPU.
        with torch.cuda.graph(graph, pool=pool.handle(), stream=side, capture_error_mode="thread_local"):
            run()
        pool.add(graph)
        return graph


@contextmanager
def capturing(device: torch.device) -> Iterator[None]:
    """Around a capture: one at a time, and no collecting of garbage, as a graph that goes away would end it."""
    with _CAPTURING, torch.cuda.device(device):
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Where captures run; one for all, since cuBLAS keeps a workspace for each stream it is used on."""
    if device not in _SIDE:
        _SIDE[device] = torch.cuda.Stream(device)
    return _SIDE[device]


def bucket_of(num_tokens: int) -> int:
    return next(bucket for bucket in BUCKETS if num_tokens <= bucket)
