# SPDX-License-Identifier: Apache-2.0
"""Deals videos out to processes. What a stream gives depends on nothing but the plan, so their number changes nothing.

A process takes one video at a time and watches it under every setting that is still to be done.
"""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from livevlm.checkpoint import load
from livevlm.errors import ConfigError, LiveVLMError
from livevlm.evaluating.plan import Plan
from livevlm.evaluating.records import key_of
from livevlm.evaluating.settings import Setting
from livevlm.evaluating.watching import Embeddings, watch
from livevlm.models import adapter_for

Task = tuple[int, int, tuple[Setting, ...]]
"""Frames, number of the video, and the settings it is to be watched under."""


class Worker:
    """Watches videos; one thread, since the model is small and a second one would only wait."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(1)
        self.plan = plan
        self.checkpoint = load(plan.model, device=plan.device)
        self.adapter = adapter_for(self.checkpoint.model)

    def records(self, task: Task) -> Iterator[dict[str, Any]]:
        plan, (num_frames, index, settings) = self.plan, task
        video = plan.video(num_frames, index)
        questions, frames = plan.questions_of(video, index), video.frames.to(self.adapter.device)
        embeddings: Embeddings = {}
        for setting in settings:
            config = setting.config(
                num_frames,
                self.adapter.tokens_per_frame,
                clip_frames=plan.clip_frames,
                seed=index,
            )
            result = watch(self.checkpoint, config, frames, questions, embeddings)
            yield {"key": key_of(num_frames, index, setting), **result}


def run(plan: Plan, tasks: Sequence[Task], num_processes: int) -> Generator[dict[str, Any], None, None]:
    """The records of all tasks, as they come.

    Raises:
        LiveVLMError: a process failed.
    """
    if num_processes == 1:
        worker = Worker(plan)
        for task in tasks:
            yield from worker.records(task)
        return
    context: Any = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    waiting, done = context.Queue(), context.Queue()
    for item in (*tasks, *[None] * num_processes):
        waiting.put(item)
    with _processes(context, num_processes, (plan, waiting, done)) as processes:
        ended = 0
        while ended < num_processes:
            try:
                kind, value = done.get(timeout=1.0)
            except queue.Empty:
                broken = [process for process in processes if process.exitcode]
                if broken:
                    raise LiveVLMError(f"a process ended with code {broken[0].exitcode}") from None
                continue
            if kind == "error":
                raise (ConfigError if value[0] else LiveVLMError)(value[1])
            ended += kind == "end"
            if kind == "record":
                yield value


@contextmanager
def _processes(context: Any, count: int, arguments: tuple[Any, ...]) -> Iterator[list[Any]]:
    processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work(plan: Plan, waiting: Any, done: Any) -> None:
    """A process: tasks until there are no more."""
    try:
        from livevlm.cli.watch import quiet_libraries

        quiet_libraries()
        worker, parent = Worker(plan), multiprocessing.parent_process()
        while (task := waiting.get()) is not None:
            for record in worker.records(task):
                if parent is None or not parent.is_alive():  # it was killed: nobody hears of what is done here
                    return
                done.put(("record", record))
        done.put(("end", None))
    except LiveVLMError as error:
        done.put(("error", (isinstance(error, ConfigError), str(error))))
    except Exception:
        done.put(("error", (False, traceback.format_exc())))
