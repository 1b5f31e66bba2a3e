# SPDX-License-Identifier: Apache-2.0
"""Reads a video into a stream with a progress bar, and asks the questions at their times."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

import huggingface_hub
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from livevlm.answer import Answer
from livevlm.checkpoint import Checkpoint, load
from livevlm.cli.values import format_bytes, format_time
from livevlm.clips import Clips
from livevlm.errors import ConfigError, VideoError
from livevlm.feed import LIVE_DELAY
from livevlm.models import adapter_for
from livevlm.staging import Staging, clip_of
from livevlm.stream import Stream
from livevlm.types import Drop
from livevlm.video import VideoReader

SMALL_MODEL = 50_000_000  # parameters; one thread is enough for fewer


def quiet_libraries() -> None:
    """No progress bars and notices but our own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()


def load_quietly(name: str, device: str) -> Checkpoint:
    """`livevlm.load` without the libraries' own words."""
    quiet_libraries()
    checkpoint = load(name, device=device)
    set_threads(checkpoint.model)
    return checkpoint


def set_threads(model: torch.nn.Module) -> None:
    """One thread for a small model: on a busy machine, threads that wait for each other cost a hundred times more."""
    if sum(weight.numel() for weight in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)


def num_video_tokens(reader: VideoReader, checkpoint: Checkpoint) -> int | None:
    """Video tokens of the whole video, if its length is known."""
    if reader.num_frames_estimate is None:
        return None
    return reader.num_frames_estimate * adapter_for(checkpoint.model).tokens_per_frame


class Session:
    """One run of `livevlm ask`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: dict[str, Any],
        reader: VideoReader,
        *,
        stop_at: float | None,
        quiet: bool,
        max_delay: float | None = None,
        drop: Drop | None = None,
    ) -> None:
        config = dataclasses.replace(checkpoint.config, **settings)
        self.stream = Stream(checkpoint.model, checkpoint.processor, config)
        self.reader, self.stop_at, self.quiet = reader, stop_at, quiet
        self.max_delay = LIVE_DELAY if max_delay is None and reader.is_live else max_delay
        self.drop: Drop = drop or ("oldest" if reader.is_live else "never")
        self.console = Console(highlight=False)
        self.answers: list[dict[str, Any]] = []

    def run(self, questions: Iterable[str], timed: Iterable[tuple[float, str]]) -> list[dict[str, Any]]:
        """Watches and asks; returns the answers in the order they were given."""
        waiting = sorted(timed, key=itemgetter(0))
        for question in (*questions, *(text for _, text in waiting)):
            self.stream.processor.prompt(question)  # refused now, not after the video
        duration = self.reader.duration
        if waiting and duration is not None and waiting[-1][0] > duration:
            raise ConfigError(f"--at {format_time(waiting[-1][0])} is after the video's end at {format_time(duration)}")
        if waiting and self.stop_at is not None and waiting[-1][0] > self.stop_at:
            raise ConfigError(f"--at {format_time(waiting[-1][0])} is after --for {format_time(self.stop_at)}")
        with self._progress() as progress:
            self._watch(progress, waiting)
        if not self.stream.stats().num_frames:
            raise VideoError(f"{self.reader.path}: no frame to look at")
        for _, question in waiting:  # a camera that was stopped before their time
            self._ask(question)
        for question in questions:
            self._ask(question)
        if not self.quiet:
            self._print_stats()
        return self.answers

    # ---------------------------------------------------------------- watching
    def _progress(self) -> Progress:
        columns = (
            SpinnerColumn(),
            TextColumn("watching"),
            BarColumn(),
            TextColumn("{task.fields[clock]}  memory {task.fields[memory]}"),
        )
        console = Console(stderr=True)
        return Progress(*columns, console=console, transient=True, disable=self.quiet or not console.is_terminal)

    def _watch(self, progress: Progress, waiting: list[tuple[float, str]]) -> None:
        total = self.reader.num_frames_estimate
        task = progress.add_task("watching", total=total, clock="00:00", memory="empty")
        adapter = self.stream.cache.adapter
        clips = Clips(
            self._frames(),
            Staging(self.stream.processor, adapter.image_size, adapter.device),
            clip_frames=self.stream.config.clip_frames,
            max_delay=self.max_delay,
            drop=self.drop,
            cuts=[time for time, _ in waiting],
        )

        def read() -> None:
            for clip in clips:
                while waiting and clip.times[0] > waiting[0][0]:
                    progress.stop()  # an answer is printed where the bar stands
                    self._ask(waiting.pop(0)[1])
                    progress.start()
                self.stream.read_staged(clip_of(clip.frames), clip.times, clips.num_dropped)
                progress.update(task, advance=len(clip.times), clock=self._clock(), memory=self._memory())

        with clips:
            try:
                read()
            except KeyboardInterrupt:
                if not self.reader.is_live:
                    raise
                clips.stop()
                read()  # what had come by then

    def _frames(self) -> Iterator[tuple[float, torch.Tensor]]:
        for time, frame in self.reader:
            if self.stop_at is not None and time > self.stop_at:
                return
            yield time, frame

    def _clock(self) -> str:
        now = format_time(self.stream.stats().seconds)
        return now if self.reader.duration is None else f"{now} / {format_time(self.reader.duration)}"

    def _memory(self) -> str:
        stats = self.stream.stats()
        budget = "" if stats.budget is None else f" (budget {stats.budget})"
        return f"{stats.num_video_tokens} tokens{budget}, {format_bytes(stats.kv_bytes)}"

    # ---------------------------------------------------------------- asking
    def _ask(self, question: str) -> None:
        answer = self.stream.ask(question)
        self.answers.append(
            {
                "question": question,
                "time": answer.time,
                "answer": str(answer),
                "evidence": [dataclasses.asdict(item) for item in answer.evidence],
                "num_tokens": answer.num_tokens,
                "ttft_ms": round(answer.ttft * 1e3, 2),
                "total_ms": round(answer.seconds * 1e3, 2),
            }
        )
        if not self.quiet:
            self._print(question, answer)

    def _print(self, question: str, answer: Answer) -> None:
        seen = ", ".join(format_time(item.time) for item in sorted(answer.evidence, key=lambda e: e.time))
        where = f"   seen at {seen}" if seen else ""
        line = Text.assemble(
            (format_time(answer.time), "dim"),
            f"  {question}\n       ",
            (str(answer) or "(no answer)", "bold"),
            (f"{where}; first token after {answer.ttft * 1e3:.0f} ms", "dim"),
        )
        self.console.print(line, soft_wrap=True)

    def _print_stats(self) -> None:
        stats = self.stream.stats()
        share = stats.num_video_tokens / stats.num_seen_tokens
        per_frame = stats.encode_seconds / stats.num_frames * 1e3
        config = self.stream.config
        dropped = f", {stats.num_dropped_frames} left out" if stats.num_dropped_frames else ""
        self.console.print(
            f"[dim]{stats.num_frames} frames at {per_frame:.0f} ms{dropped}; memory {self._memory()} "
            f"({share:.0%} of the {stats.num_seen_tokens} seen); "
            f"policy {config.policy}, retrieval {config.retrieval}[/]",
            soft_wrap=True,
        )
