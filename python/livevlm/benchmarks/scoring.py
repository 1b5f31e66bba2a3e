# SPDX-License-Identifier: Apache-2.0
"""Is a reply right? Strictly, by a parser that finds one answer or none; and as a benchmark's own script decides."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from livevlm.benchmarks.schema import LETTERS, Query

Official = Callable[[str, Query], bool]
TIME_SLACK = 2.0  # seconds by which StreamingBench lets a proactive answer be early or late
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


# ---------------------------------------------------------------- strict
def is_right(reply: str, query: Query) -> bool | None:
    """None: the benchmark's file has no answer."""
    if not query.answer:
        return None
    if query.kind == "choice":
        return find_letter(reply, query.options) == query.answer
    if query.kind == "count":
        return find_number(reply) == int(query.answer)
    if query.kind == "yesno":
        return find_yes_no(reply) == query.answer
    return plain(reply) == plain(query.answer)


def find_letter(reply: str, options: Sequence[str]) -> str | None:
    """The letter of the one option that a reply names, by its letter or its whole text; None if it isn't clear."""
    letters = LETTERS[: len(options)]
    said = reply.strip()
    alone = re.fullmatch(rf"\W*([{letters}])\W*", said)
    if alone:
        return alone[1]
    texts = [letter for letter, option in zip(letters, options, strict=True) if plain(option) == plain(said)]
    if len(texts) == 1:
        return texts[0]
    named = rf"(?i:\b(?:answer|option|choice)(?: is)?)\s*:?\s*\(?([{letters}])(?=\W*$|[).:,\n])"
    found = set(re.findall(named, said))
    found |= set(re.findall(rf"\(([{letters}])\)", said))
    first = re.match(rf"\(?([{letters}])[.):\n]", said)
    if first:
        found.add(first[1])
    return found.pop() if len(found) == 1 else None


def find_number(reply: str) -> int | None:
    """The one whole number of a reply, in digits or as a word up to twelve."""
    words = re.findall(r"\d+(?:[.,]\d+)?|[a-z]+", reply.lower())
    found = {NUMBERS.index(word) if word in NUMBERS else int(word) for word in words if word in NUMBERS or _whole(word)}
    has_fraction = any(word[0].isdigit() and not _whole(word) for word in words)
    return found.pop() if len(found) == 1 and not has_fraction else None


def _whole(word: str) -> bool:
    return re.fullmatch(r"\d+", word) is not None


def find_yes_no(reply: str) -> str | None:
    words = set(re.findall(r"[a-z]+", reply.lower()))
    if plain(reply) in ("y", "n"):
        return {"y": "yes", "n": "no"}[plain(reply)]
    return next(iter(words & {"yes", "no"})) if len(words & {"yes", "no"}) == 1 else None


def plain(text: str) -> str:
    """Lower case, without punctuation at the ends and with single spaces."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'()")


# ---------------------------------------------------------------- as the benchmarks' scripts decide
def first_character(reply: str, query: Query) -> bool:
    """The reply begins with the letter."""
    return reply.startswith(query.answer)


def before_bracket(reply: str, query: Query) -> bool:
    """The character before the first closing bracket, or else the first one: ReKV's, HERMES' and MLVU's rule."""
    said = reply.strip()
    index = max(said.find(")") - 1, 0)
    return said[index : index + 1] == query.answer


def letter_inside(reply: str, query: Query) -> bool:
    """The letter is anywhere in the reply: "A" is right for every reply with a capital A in it."""
    return query.answer in reply


def first_letter(reply: str, query: Query) -> bool:
    """The first capital that is an option's letter, inside of words too."""
    match = re.search(rf"[{LETTERS[: len(query.options)]}]", reply)
    return match is not None and match[0] == query.answer


def first_of_five(reply: str, query: Query) -> bool:
    """LongVideoBench: the first A to E, however many options there are. The B of "Best option:" does not count."""
    match = re.search("[A-E]", reply.replace("Best answer:", "").replace("Best option:", ""))
    return match is not None and match[0] == query.answer  # of no letter its script makes a random one


def last_marked(reply: str, query: Query) -> bool:
    """CG-Bench: a letter before a point or colon; else in brackets; else before a space. Of several, the last."""
    said = reply.replace("\n", "")
    for mark in ",.!?;:'":
        said = said.strip(mark)
    said, letters = f" {said} ", LETTERS[: max(8, len(query.options))]

    def with_mark(mark: str) -> list[str]:
        return [letter for letter in letters if mark.replace("X", letter) in said]

    points, colons, brackets = with_mark("X."), with_mark("X:"), with_mark("(X)")
    found = points + colons or brackets or with_mark("X ")
    mark = "X." if points else "X:" if colons else "(X)" if brackets else " X "
    return bool(found) and max(found, key=lambda letter: said.rfind(mark.replace("X", letter))) == query.answer


def whole_option(reply: str, query: Query) -> bool:
    """The reply is an option: its letter, its text, or both, with or without a full stop behind it."""
    options = dict(zip(LETTERS, query.options, strict=False))
    said = reply.strip().removesuffix(".")
    named = [a for a, text in options.items() if said in (a, text.removesuffix("."), f"{a}. {text.removesuffix('.')}")]
    return named[:1] == [query.answer]


def joined_digits(reply: str, query: Query) -> bool:
    """All digits of the reply, put together, are the number."""
    return "".join(re.findall(r"\d+", reply)) == query.answer


def yes_no_inside(reply: str, query: Query) -> bool:
    """ "Yes" or "No" is anywhere in the reply, or the reply is Y or N."""
    return query.answer.capitalize() in reply or reply == query.answer[0].upper()


def official(reply: str, query: Query, choice: Official) -> bool | None:
    """None: there is no official rule without a judge, or no answer in the file."""
    if not query.answer or query.kind in ("open", "proactive"):
        return None
    choice = before_bracket if query.form == "rekv" else choice
    rule = {"choice": choice, "count": joined_digits, "yesno": yes_no_inside}[query.kind]
    return rule(reply, query)


def proactive(reply: str, said_at: float | None, query: Query) -> tuple[bool, bool]:
    """Strict and official: in time, and the output equal to, or inside of, the reply."""
    if said_at is None or query.truth_time is None:
        return False, False
    in_time = abs(said_at - query.truth_time) <= TIME_SLACK
    return in_time and plain(query.answer) == plain(reply), in_time and query.answer in reply
