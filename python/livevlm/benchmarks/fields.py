# SPDX-License-Identifier: Apache-2.0
"""Fields of an entry, checked: what is missing or of another type is said by name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from livevlm.benchmarks.schema import LETTERS, Malformed
from livevlm.benchmarks.scoring import plain

MISSING: Any = object()


def as_object(value: Any, what: str = "the entry") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{what} is {_kind(value)}, not an object")
    return value


def get(entry: dict[str, Any], *names: str, default: Any = MISSING) -> Any:
    """The first of these fields that is there and not null."""
    for name in names:
        if entry.get(name) is not None:
            return entry[name]
    if default is MISSING:
        raise Malformed(f"{' or '.join(map(repr, names))} is missing")
    return default


def text(entry: dict[str, Any], *names: str, default: Any = MISSING) -> str:
    """A text that is not empty, or a number as text."""
    value = get(entry, *names, default=default)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or (not str(value).strip() and value != ""):
        raise Malformed(f"{names[0]!r} is {_kind(value)}, not a text")
    if value == "" and default is MISSING:
        raise Malformed(f"{names[0]!r} is empty")
    return _whole(str(value), names[0])


def number(entry: dict[str, Any], *names: str, default: Any = MISSING) -> Any:
    """A finite number that is not negative."""
    value = get(entry, *names, default=default)
    if value is default:
        return value
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise Malformed(f"{names[0]!r} is {value!r}, not a number of at least 0")
    return value


def items(entry: dict[str, Any], *names: str) -> list[Any]:
    value = get(entry, *names)
    if not isinstance(value, list) or not value:
        raise Malformed(f"{names[0]!r} is {_kind(value)}, not a list of at least one item")
    return value


def clock(entry: dict[str, Any], name: str) -> float:
    """Seconds of "HH:MM:SS" or "MM:SS"."""
    value = text(entry, name)
    if re.fullmatch(r"(\d+:){1,2}\d+(\.\d+)?", value) is None:
        raise Malformed(f"{name!r} is {value!r}, not a time as HH:MM:SS")
    seconds = 0.0
    for part in value.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def options(entry: dict[str, Any], *names: str) -> tuple[str, ...]:
    """Options without the "A. " that some files put before each."""
    given = items(entry, *names)
    for option in given:
        if isinstance(option, bool) or not isinstance(option, str | int | float):
            raise Malformed(f"{names[0]!r} holds {_kind(option)}, not a text")
    found = [_whole(str(option), names[0]) for option in given]
    if not 2 <= len(found) <= len(LETTERS):
        raise Malformed(f"{names[0]!r} has {len(found)} options; allowed: 2 to {len(LETTERS)}")
    prefixes = [re.match(rf"\(?{letter}[.):]\s*", option) for letter, option in zip(LETTERS, found, strict=False)]
    if all(prefixes):
        found = [option[match.end() :] for option, match in zip(found, prefixes, strict=True) if match]
    return tuple(found)


def letter(answer: Any, choices: Sequence[str]) -> str:
    """The letter of an answer given as a letter, alone or with its option's text: "B", "(B)", "B. text"."""
    match = re.fullmatch(r"\(?([A-N])([.):]*)(?:\s*(\S.*))?", str(answer).strip(), re.DOTALL)
    if match is not None and LETTERS.index(match[1]) < len(choices):
        text = plain(match[3] or "")
        texts = [plain(choice) for choice in choices]
        # Behind a point or bracket a text may be worded otherwise, but not be another option's; "A man" is no letter.
        if not text or text == texts[LETTERS.index(match[1])] or (match[2] and text not in texts):
            return match[1]
    raise Malformed(f"the answer {answer!r} is none of the {len(choices)} options")


def letter_of_text(answer: Any, choices: Sequence[str]) -> str:
    """The letter of an answer given as an option's text, or else as `letter` takes it."""
    said = str(answer).strip()
    if said in choices:
        return LETTERS[list(choices).index(said)]  # of equal options the first, as ReKV does
    return letter(answer, choices)


def letter_at(index: Any, choices: Sequence[str], name: str) -> str:
    """The letter of an answer given as a number from 0."""
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        raise Malformed(f"{name!r} is {index!r}, not the index of one of {len(choices)} options, counted from 0")
    return LETTERS[index]


def windows(entry: dict[str, Any], *names: str) -> tuple[tuple[float, float], ...]:
    """Pairs of seconds; none if the field is not there."""
    found = get(entry, *names, default=[])
    try:
        pairs = tuple((float(start), float(end)) for start, end in found)
    except (TypeError, ValueError):
        pairs = ((math.nan, math.nan),)
    if not all(0 <= start <= end < math.inf for start, end in pairs):
        raise Malformed(f"{names[0]!r} is {found!r}, not a list of pairs of seconds, from and to")
    return pairs


def _whole(text: str, name: str) -> str:
    """Without space at its ends. JSON can hold halves of a character, which no tokenizer and no file takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Malformed(f"{name!r} holds half a character: {text!r}")
    return text.strip()


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), repr(value))
