# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is, where one thread reads a stream and others ask: questions go before the next clip."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Between clips and questions. A question waits for the clip being read; a clip waits for all questions."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._questions: list[int] = []  # threads that wait for an answer, or are being given one
        self._reading = False

    @contextmanager
    def asking(self) -> Iterator[None]:
        thread = threading.get_ident()
        with self._changed:
            self._questions.append(thread)
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._reading)
            yield
        finally:
            with self._changed:
                self._questions.remove(thread)
                self._changed.notify_all()

    def asked_here(self) -> bool:
        """Whether this thread has a question that is not answered to the end."""
        return threading.get_ident() in self._questions

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._questions)
            self._reading = True
        try:
            yield
        finally:
            with self._changed:
                self._reading = False
                self._changed.notify_all()
