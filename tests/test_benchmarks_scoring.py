# SPDX-License-Identifier: Apache-2.0
"""Which replies are right: strictly, and by the rules of the benchmarks' own scripts."""

from __future__ import annotations

import pytest

from livevlm.benchmarks import scoring
from livevlm.benchmarks.judge import verdict
from livevlm.benchmarks.schema import Query

OPTIONS = ("A man", "red", "blue.", "both of them")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("(C)", "C"), (" D. ", "D"), ("B. red", "B"), ("B) red", "B"), ("B: red", "B"), ("C\nblue", "C"),
        ("The answer is B.", "B"), ("Answer: (C)", "C"), ("The best option is (B) red", "B"), ("Best option: D", "D"),
        ("red", "B"), ("Blue", "C"), ("a man", "A"), ("Both of them.", "D"),
        ("", None), ("A man in red", None), ("A or B", None), ("(A) or (B)", None), ("E", None), ("b", None),
        ("The answer is A man", None), ("green", None), ("I do not know", None), ("Answer: A. Answer: B.", None),
    ],
)  # fmt: skip
def test_one_letter_or_none(reply: str, letter: str | None) -> None:
    assert scoring.find_letter(reply, OPTIONS) == letter


@pytest.mark.parametrize(
    ("reply", "number"),
    [("3", 3), ("Three.", 3), ("They did it 3 times", 3), ("three (3)", 3), ("1 2", None), ("2.5", None), ("no", None)],
)
def test_one_number_or_none(reply: str, number: int | None) -> None:
    assert scoring.find_number(reply) == number


@pytest.mark.parametrize(
    ("reply", "word"),
    [("Yes.", "yes"), ("no", "no"), ("N", "no"), ("Yes, it is", "yes"), ("yes or no", None), ("Nothing", None)],
)
def test_yes_or_no(reply: str, word: str | None) -> None:
    assert scoring.find_yes_no(reply) == word


def test_official_rules_are_lenient_where_they_are() -> None:
    a = Query("choice", "?", "A", OPTIONS)
    assert scoring.letter_inside("It is All wrong", a) and not scoring.is_right("It is All wrong", a)
    assert scoring.first_character("A man walks", a) and not scoring.first_character("(A) x", a)
    for reply, right in (
        ("A) red", 1),
        ("(A)", 1),
        ("B or A)", 1),
        ("A", 1),
        (")", 0),
        ("", 0),
        ("B (A)", 1),
        ("B A", 0),
    ):
        assert scoring.before_bracket(reply, a) == bool(right), reply
    for reply, right in (("A", 1), ("A.", 1), ("A man.", 1), ("A. A man", 1), ("A man walks", 0), ("(A)", 0), ("", 0)):
        assert scoring.whole_option(reply, a) == bool(right), reply
    rekv = Query("choice", "?", "A", OPTIONS, form="rekv")
    assert scoring.official("B (A)", rekv, scoring.first_letter) and not scoring.official(
        "B (A)", a, scoring.first_letter
    )
    assert not scoring.first_character("The answer is A", a) and scoring.is_right("The answer is A", a)
    assert scoring.first_letter("The answer is A", a) and not scoring.first_letter("Both", a)
    count = Query("count", "?", "12")
    assert scoring.joined_digits("1 and 2", count) and not scoring.is_right("1 and 2", count)
    no = Query("yesno", "?", "no")
    assert scoring.yes_no_inside("Nothing. No", no) and scoring.yes_no_inside("N", no)
    assert not scoring.yes_no_inside("no", no) and scoring.is_right("no", no)
    assert scoring.is_right("x", Query("choice", "?", "", OPTIONS)) is None


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("Best option: (A", "A"),
        ("Best answer: C", "C"),
        ("The answer is A", "A"),
        ("E is not one", "E"),
        ("it is a", ""),
    ],
)
def test_longvideobench_takes_the_first_of_five_letters(reply: str, letter: str) -> None:
    given = [one for one in "ABCDE" if scoring.first_of_five(reply, Query("choice", "?", one, OPTIONS))]
    assert given == list(letter)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) or (C)", "C"),
        ("A. no, B. yes (C)", "B"),  # a point counts more than a bracket, and the last of those
        ("A: x B. y", "B"),
        ("C or\nB", "C"),  # lines are joined without a space
        ("The NBA team", "A"),  # as a word ends
        ("C) x", ""),
        ("", ""),
    ],
)
def test_cgbench_takes_the_last_marked_letter(reply: str, letter: str) -> None:
    given = [one for one in "ABCDEFGH" if scoring.last_marked(reply, Query("choice", "?", one, OPTIONS))]
    assert given == list(letter)


def test_proactive_needs_the_time_and_the_words() -> None:
    query = Query("proactive", "?", "goal", polls=(1.0,), truth_time=10.0)
    assert scoring.proactive("Goal.", 12.0, query) == (True, False)
    assert scoring.proactive("a goal now", 8.0, query) == (False, True)
    assert scoring.proactive("goal", 12.5, query) == scoring.proactive("goal", None, query) == (False, False)


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ('{"pred": "yes", "score": 4}', True, 4), ("{'pred': 'no', 'score': 1}", False, 1),
        ("pred: Yes, score: 4.8", True, 4), ("yes", None, None), ('{"pred": "yes"}', None, None),
    ],
)  # fmt: skip
def test_verdicts(said: str, right: bool | None, score: int | None) -> None:
    found = verdict(said)
    assert (found.right, found.score) == (right, score)
