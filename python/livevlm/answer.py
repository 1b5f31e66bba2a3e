# SPDX-License-Identifier: Apache-2.0
"""An answer and what it rests on."""

from __future__ import annotations

from livevlm.evidence import Evidence


class Answer(str):
    """The text of an answer; a `str` that also knows where it came from.

    Attributes:
        question: what was asked.
        time: seconds of stream seen when it was asked.
        evidence: frames the answer rests on, most attended to first.
        num_tokens: tokens generated.
        ttft: seconds until the first token was known.
        seconds: seconds until the answer was complete.
    """

    question: str
    time: float
    evidence: tuple[Evidence, ...]
    num_tokens: int
    ttft: float
    seconds: float
