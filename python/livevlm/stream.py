# SPDX-License-Identifier: Apache-2.0
"""Stream: push frames, ask questions."""

from __future__ import annotations

import os
import time as clock
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from livevlm.answer import Answer
from livevlm.cache import LiveCache
from livevlm.config import Config
from livevlm.decoding import Question, answer_tokens, needs_two_passes, warm_up
from livevlm.errors import ConfigError, FrameError, StateError
from livevlm.evidence import evidence_of
from livevlm.feed import Feed
from livevlm.frames import as_frames
from livevlm.gate import Gate
from livevlm.options import AskOptions, Decoding
from livevlm.processing import Processor
from livevlm.staging import Pinned
from livevlm.types import Drop


@dataclass(frozen=True)
class StreamStats:
    """Where a stream stands.

    Attributes:
        num_frames: frames seen.
        seconds: time of the newest frame.
        num_video_tokens: video tokens held per layer: of clips smaller than `Config.clip_frames`, up to
            `budget * (1 + slack)`; else up to `budget`.
        num_seen_tokens: video tokens that ever went through the model.
        budget: most video tokens that a compression leaves; None with policy "full".
        kv_bytes: keys and values held, all layers.
        allocated_bytes: all tensors of the memory, room for the next clip and question included.
        peak_bytes: most bytes ever allocated.
        encode_seconds: time spent reading frames.
        num_questions: questions answered.
        graphs: how the newest answer was computed: "on" (CUDA graphs), "off: why" or "failed: why"; before the first
            one, how it will be.
        num_dropped_frames: frames of live sources that were left out because reading was slower; see `Stream.watching`.
        num_clips: clips read, and `num_replayed_clips` of them as CUDA graphs.
        why_eager: why the newest clip was not one, if it was not.
        vision: how frames are embedded: "by hand", or "modules: why", by transformers' own.
    """

    num_frames: int
    seconds: float
    num_video_tokens: int
    num_seen_tokens: int
    budget: int | None
    kv_bytes: int
    allocated_bytes: int
    peak_bytes: int
    encode_seconds: float
    num_questions: int
    graphs: str
    num_dropped_frames: int
    num_clips: int
    num_replayed_clips: int
    why_eager: str
    vision: str


class Stream:
    """A video that is watched while it runs, with a memory of bounded size.

    Args:
        model: a transformers LLaVA-OneVision model, as loaded.
        processor: its processor or tokenizer, or a `livevlm.Processor`.
        config: settings; `livevlm.Config()` if None.

    Raises:
        ModelError: the model or the processor is not supported.
        ConfigError: the budget does not fit the model.
    """

    def __init__(self, model: nn.Module, processor: Any, config: Config | None = None) -> None:
        self.config = config or Config()
        self.processor = Processor.wrap(processor)
        self.cache = LiveCache(model, self.config)
        if self.cache.policy.asks:
            self.cache.template = self.processor.template().to(self.cache.adapter.device)
        self.frame_size: tuple[int, ...] | None = None  # height and width of its frames as they were given
        self.gate = Gate()
        device = self.cache.adapter.device
        # One object for good, as graphs are told apart by it; not a method, which graphs would hold the stream by.
        self._pixels = partial(self.processor.pixels, image_size=self.cache.adapter.image_size)
        self._pinned = Pinned(device, 2) if device.type == "cuda" else None
        self._feed: Callable[[], Feed | None] = lambda: None  # a weak reference: a feed has its stream
        self._time: float | None = None
        self._encode_seconds = 0.0
        self._num_questions = self._num_dropped_frames = self._num_dropped_before = 0
        generation = getattr(model, "generation_config", None)
        stop = getattr(generation, "eos_token_id", None)
        stop = self.processor.tokenizer.eos_token_id if stop is None else stop
        self._stop = frozenset(stop if isinstance(stop, list) else [stop])

    # ---------------------------------------------------------------- watching
    def push(self, frames: Any, *, times: Sequence[float] | Tensor | None = None) -> None:
        """Shows the model more frames. They are read at once, in clips of at most `config.clip_frames`.

        Args:
            frames: see `livevlm.frames.as_frames`: tensors, arrays or PIL images, one or many, uint8 or 0..1.
            times: seconds of each frame since the start of the stream, not decreasing; one second after another
                from the newest frame on if None.

        A clip that fails leaves no trace. Of a push in several clips, those before it stay: `stats().num_frames` tells
        how many frames were read.

        Raises:
            FrameError: unusable frames or times, or frames of another size than before; nothing was read.
            StateError: an answer is being generated, or a source is being watched.
        """
        if self._watching:
            raise StateError("a source is being watched; close that before pushing frames of another")
        batch = as_frames(frames)
        size = tuple(batch.shape[-2:])
        if self.frame_size is not None and size != self.frame_size:
            raise FrameError(
                f"frames have size {size} but the stream's are {self.frame_size}; they cannot change within one"
            )
        stamps = self._times(times, batch.shape[0])
        adapter, clip = self.cache.adapter, self.config.clip_frames
        for first in range(0, batch.shape[0], clip):
            part = batch[first : first + clip]
            part = self._pinned(part) if self._pinned and not part.is_cuda else part.to(adapter.device)
            self._read(part, stamps[first : first + clip], self._pixels, at_once=batch.shape[0] >= clip)
            self.frame_size = size

    def watching(
        self,
        source: str | os.PathLike[str] | Iterable[tuple[float, Any]],
        *,
        fps: float | None = 1.0,
        clip_frames: int | None = None,
        max_delay: float | None = None,
        drop: Drop | None = None,
        queue_frames: int | None = None,
        start: float = 0.0,
    ) -> Feed:
        """Reads a source in the background, while questions are asked:

            with stream.watching("rtsp://camera", max_delay=0.5) as feed:
                print(stream.ask("Who is at the door?"))
                feed.wait()  # until the source ends

        One thread decodes frames, brings them to the device and resizes them, another one reads them. A question is
        answered after the clip being read, before all frames that wait; while it is answered, nothing is read.

        Args:
            source: a file, camera or address, as for `livevlm.open_video`, or an iterable of (seconds, frame), used by
                another thread.
            fps: for a file, camera or address: frames a second that are looked at; None for every one.
            clip_frames: most frames read at once, `config.clip_frames` if None: many are read faster.
            max_delay: seconds after which a frame is read, whether its clip is full or not: 0 reads whatever is there.
                None waits for full clips; for a live source, half a second.
            drop: what to do when frames come faster than they are read: let the source wait ("never", the default for
                files), or leave out the "oldest" waiting frame (the default for live sources) or the "newest". What is
                left out is counted in `stats()`.
            queue_frames: most frames that wait, two clips if None.
            start: seconds of the stream at which the source's time begins.

        Raises:
            ConfigError: an option is out of range.
            StateError: another source is being watched.
            VideoError: the source cannot be opened.
        """
        if self._watching:
            raise StateError("another source is being watched; close it first")
        for name, value, least in (
            ("clip_frames", clip_frames, 1), ("queue_frames", queue_frames, 1), ("max_delay", max_delay, 0),
        ):  # fmt: skip
            if value is not None and not value >= least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        if drop not in (None, *get_args(Drop)):
            raise ConfigError(f"drop={drop!r} is unknown; allowed: {', '.join(get_args(Drop))}")
        options: Any = {"fps": fps, "clip_frames": clip_frames, "max_delay": max_delay, "drop": drop}
        self._num_dropped_before = self._num_dropped_frames
        feed = Feed(self, source, queue_frames=queue_frames, start=start, **options)
        self._feed = weakref.ref(feed)
        return feed

    @property
    def _watching(self) -> bool:
        feed = self._feed()
        return feed is not None and not feed.ended

    def read_staged(self, frames: Tensor, times: Sequence[float], num_dropped: int = 0) -> None:
        """A clip from `livevlm.staging`; `num_dropped` frames of its source have been left out so far."""
        self._read(frames, self._times(times, frames.shape[0]), self.processor.normalised)
        self._num_dropped_frames = self._num_dropped_before + num_dropped

    def _read(
        self, frames: Tensor, stamps: Tensor, normalise: Callable[[Tensor], Tensor], *, at_once: bool = False
    ) -> None:
        """Reads a clip, uint8 on the model's device; see `LiveCache.push_unchecked`."""
        start = clock.perf_counter()
        if not self.cache.num_frames:
            self.cache.prefill_prompt(self.processor.prompt("?")[0])
        self.cache.push_unchecked(frames, stamps, normalise, at_once=at_once)
        self._time = float(stamps[-1])
        self._encode_seconds += clock.perf_counter() - start

    def _times(self, times: Sequence[float] | Tensor | None, count: int) -> Tensor:
        if times is None:
            first = 0.0 if self._time is None else self._time + 1.0
            return torch.arange(count, dtype=torch.float64) + first
        stamps = torch.as_tensor(times, dtype=torch.float64).reshape(-1).cpu()
        if stamps.numel() != count:
            raise FrameError(f"times has {stamps.numel()} entries for {count} frames; allowed: one for each")
        if not bool(torch.isfinite(stamps).all()):
            raise FrameError("times hold NaN or infinite values; allowed: seconds since the start of the stream")
        newest = float(stamps[0]) if self._time is None else self._time
        before = torch.cat((stamps.new_tensor([newest]), stamps[:-1]))
        if bool((stamps < before).any()):
            raise FrameError(f"times run backwards (newest frame: {self._time} s); allowed: not decreasing")
        return stamps

    # ---------------------------------------------------------------- asking
    @overload
    def ask(self, question: str, *, stream: Literal[False] = False, **options: Unpack[AskOptions]) -> Answer: ...
    @overload
    def ask(self, question: str, *, stream: Literal[True], **options: Unpack[AskOptions]) -> Iterator[str]: ...

    def ask(self, question: str, *, stream: bool = False, **options: Unpack[AskOptions]) -> Answer | Iterator[str]:
        """Answers a question about everything seen so far. The memory is bit for bit the same afterwards.

        Args:
            question: text, not empty.
            stream: give an iterator of pieces of text, as they are generated, in the place of the whole answer. The
                question ends when the iterator does (or is closed); frames can be pushed again then.
            max_new_tokens: longest answer; `config.max_new_tokens` by default.
            temperature: 0 takes the likeliest token; above 0 samples.
            top_p: sample from the likeliest tokens that make up this probability.
            seed: of the sampling.
            num_evidence: frames to report as the answer's evidence; 0 saves looking for them.

        Raises:
            QuestionError: the question is empty.
            ConfigError: an option is out of range.
            StateError: no frame has been pushed, or another answer is being generated.
        """
        options.setdefault("max_new_tokens", self.config.max_new_tokens)
        decoding = Decoding(**options)
        start = clock.perf_counter()
        _, token_ids = self.processor.prompt(question)
        with self.gate.asking():
            self.cache.require_askable()
        answer = self._in_turn(self._answer(question, token_ids, decoding, clock.perf_counter() - start))
        if stream:
            return _pieces(answer)
        *_, whole = answer
        assert isinstance(whole, Answer)
        return whole

    def _in_turn(self, answer: Generator[str, None, None]) -> Generator[str, None, None]:
        """The answer, once a clip that another thread is reading is in memory."""
        asked = clock.perf_counter()
        with self.gate.asking(), closing(answer):
            waited = clock.perf_counter() - asked
            for piece in answer:
                if isinstance(piece, Answer):
                    piece.ttft += waited
                    piece.seconds += waited
                yield piece

    def _answer(self, question: str, token_ids: Tensor, options: Decoding, spent: float) -> Generator[str, None, None]:
        """Yields new pieces of text, then the Answer. Ends the question however it is left. `spent`: seconds so far."""
        cache, tokenizer, start = self.cache, self.processor.tokenizer, clock.perf_counter() - spent
        turn = cache.begin_question(want_mass=options.num_evidence > 0)
        try:
            asked = Question(token_ids, self.processor.text(question) if needs_two_passes(cache) else None)
            ids: list[int] = []
            text, ttft = "", 0.0
            for token in answer_tokens(cache, turn, asked, options, self._stop):
                ttft = ttft or clock.perf_counter() - start
                ids.append(token)
                whole = tokenizer.decode(ids, skip_special_tokens=True)
                if len(whole) > len(text) and not whole.endswith("\ufffd"):  # not in the middle of a character
                    yield whole[len(text) :]
                    text = whole
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            if len(whole) > len(text):
                yield whole[len(text) :]
            answer = Answer(whole.strip())
            answer.question, answer.time, answer.num_tokens = question, self._time or 0.0, len(ids)
            answer.seconds = clock.perf_counter() - start
            answer.ttft = ttft or answer.seconds
            looks = turn.found()
            answer.evidence = () if looks is None else evidence_of(looks, cache.memory, options.num_evidence)
            self._num_questions += 1
        finally:
            cache.end_question()
        yield answer

    def warmup(self, *, max_new_tokens: int | None = None) -> None:
        """Captures CUDA graphs for questions of all lengths, so that the first ones are answered as fast as later ones.

        They are captured anew when they must be, which the next question then waits for: after the memory has grown
        (policy "full", or an answer longer than there was room for), and after weights or modules were exchanged.
        `stats().graphs` says how it went.

        Raises:
            StateError: no frame has been pushed, or an answer is being generated.
        """
        self.cache.require_askable()
        warm_up(self.cache, max_new_tokens or self.config.max_new_tokens)

    # ---------------------------------------------------------------- telling
    def stats(self) -> StreamStats:
        """Counters of this stream; no synchronisation with a GPU."""
        memory, adapter = self.cache.memory, self.cache.adapter
        return StreamStats(
            num_frames=self.cache.num_frames,
            seconds=self._time or 0.0,
            num_video_tokens=memory.num_video_tokens,
            num_seen_tokens=self.cache.num_frames * adapter.tokens_per_frame,
            budget=None if self.cache.policy.unbounded else self.cache.budget,
            kv_bytes=memory.bytes_used,
            allocated_bytes=memory.bytes_allocated,
            peak_bytes=memory.peak_bytes,
            encode_seconds=self._encode_seconds,
            num_questions=self._num_questions,
            graphs=self.cache.replay.said,
            num_dropped_frames=self._num_dropped_frames,
            num_clips=self.cache.clips.num_clips,
            num_replayed_clips=self.cache.clips.num_replayed,
            why_eager=self.cache.clips.why_eager,
            vision=self.cache.adapter.vision().said,
        )


def _pieces(answer: Generator[str, None, None]) -> Iterator[str]:
    """The pieces alone. Closing this closes the answer, whenever Python collects what is left of it."""
    with closing(answer):
        for piece in answer:
            if not isinstance(piece, Answer):
                yield piece
