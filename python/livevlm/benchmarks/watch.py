# SPDX-License-Identifier: Apache-2.0
"""One pass over a video: frames to every viewer, questions at their times."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from livevlm.benchmarks import scoring
from livevlm.benchmarks.asking import Asker, standing
from livevlm.benchmarks.frames import Source
from livevlm.benchmarks.schema import Query
from livevlm.benchmarks.viewer import Viewer
from livevlm.clips import Clips
from livevlm.errors import FrameError, QuestionError, VideoError
from livevlm.staging import Staging, clip_of

LATE = 1.0  # seconds behind the last frame's own at which a question counts as asked past the end


@dataclass
class Pass:
    """Questions of one video, put to all viewers.

    Args:
        queries: all of them, also those that have been answered: the memory depends on where clips are cut.
        wanted: (role, key) of those that are to be asked.
        tell: gets every answer, as soon as it is there.
        refuse: gets the key of a question that cannot be asked, and why.
    """

    viewers: Sequence[Viewer]
    queries: Mapping[str, Query]
    wanted: set[tuple[str, str]]
    asker: Asker
    fps: float
    clip_frames: int
    tell: Callable[[str, str, dict[str, Any]], None]
    refuse: Callable[[str, str], None]
    progress: Callable[[int], None] = lambda count: None

    def run(self, source: Source, staging: Staging) -> None:
        """Watches until the last question is answered, or the video ends; then asks what is left.

        Raises:
            VideoError, FrameError: the video broke off; questions about what came before have been asked.
        """
        moments = sorted({math.inf if t is None else t for query in self.queries.values() for t in query.times})
        polled: dict[tuple[str, str], dict[str, Any]] = {}
        newest: float | None = None
        cuts = [moment for moment in moments if moment < math.inf]
        broken: VideoError | FrameError | None = None
        with Clips(source.frames, staging, clip_frames=self.clip_frames, cuts=cuts) as clips:
            while True:
                try:
                    clip = clips.next()
                except (VideoError, FrameError) as error:
                    broken, clip = error, None
                if clip is None:
                    break
                # A question before the first frame waits for that one.
                while newest is not None and moments and clip.times[0] > moments[0]:
                    self._ask(moments.pop(0), newest, False, polled)
                if not moments or not self.wanted:
                    return
                frames = clip_of(clip.frames)
                for viewer in self.viewers:
                    viewer.read(frames, clip.frames, clip.times)
                newest = clip.times[-1]
                self.progress(len(clip.times))
        if newest is not None:
            for moment in moments:
                if broken is None or moment <= newest:
                    self._ask(moment, newest, moment > newest + 1 / self.fps + LATE, polled)
        if broken is not None and self.wanted:
            raise broken

    def _ask(self, moment: float, newest: float, past: bool, polled: dict[tuple[str, str], dict[str, Any]]) -> None:
        """All questions of this moment, to every viewer that is to answer them."""
        for key, query in self.queries.items():
            if (None if moment == math.inf else moment) not in query.times:
                continue
            for viewer in self.viewers:
                if (viewer.role, key) not in self.wanted:
                    continue
                stream = viewer.stream(newest if past or moment == math.inf else moment)
                try:
                    if query.kind == "proactive":
                        answer = self._polled(stream, query, moment, polled.setdefault((viewer.role, key), {}))
                    else:
                        answer = self.asker.ask(stream, query)
                except QuestionError as error:  # such as a marker of the model in its text
                    self.wanted -= {(one.role, key) for one in self.viewers}
                    self.refuse(key, str(error))
                    break
                if answer is not None:
                    self.wanted.discard((viewer.role, key))
                    time = None if moment == math.inf else moment
                    facts = {"ask_time": time, "past_end": past and moment < math.inf}
                    self.tell(viewer.role, key, {**facts, **answer, **standing(stream)})

    def _polled(self, stream: Any, query: Query, moment: float, state: dict[str, Any]) -> dict[str, Any] | None:
        """One second of a proactive question; an answer when its moment has come, or can come no more."""
        seen = stream.stats().num_frames, stream.stats().seconds
        if state.get("seen") != seen:  # else nothing is new: it would say the same
            state.update(self.asker.poll(stream, query), seen=seen, polls=state.get("polls", 0) + 1)
        comes = state["comes"]
        if not comes and moment != query.polls[-1]:
            return None
        reply = self.asker.output(stream, query) if comes else {**state, "reply": ""}
        said_at = moment if comes else None
        strict, official = scoring.proactive(reply["reply"], said_at, query)
        extra = {"said_at": said_at, "num_polls": state["polls"], "poll_reply": state["poll_reply"]}
        kept = {name: value for name, value in reply.items() if name not in ("comes", "seen", "polls")}
        return {**kept, **extra, "prefix": "", "strict": strict, "official": official}
