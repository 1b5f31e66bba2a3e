# SPDX-License-Identifier: Apache-2.0
"""What cannot be used is named and skipped, and the rest goes on: entries, videos, tasks, answers to old questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_kit import Silent, scripted, videos, write_json, write_npy
from eval_sets import SECONDS, VIDEOMME, Script, averages, real, rvs_entry
from livevlm.benchmarks.fields import letter, letter_at
from livevlm.benchmarks.frames import _folder
from livevlm.benchmarks.registry import FORMATS
from livevlm.benchmarks.schema import Malformed, Problem
from livevlm.config import Config
from livevlm.errors import ConfigError, VideoError


def test_a_video_that_breaks_off(tmp_path: Path) -> None:
    """Questions about what came before are answered; the others are skipped, and the next video is watched."""
    sample = Path(__file__).parents[1] / "examples" / "sample.mp4"
    (tmp_path / "cut.mp4").write_bytes(sample.read_bytes()[:120_000])
    write_npy(tmp_path / "whole.npy", videos(1, SECONDS)[0])
    write_json(tmp_path / "ego4d_oe.json", [rvs_entry("cut.mp4", [3, 60]), rvs_entry("whole.npy", [5])])
    result, lines = scripted("rvs", tmp_path, lambda prompt, times: "red", control=False)
    assert [(line["video"], line["seen_seconds"]) for line in lines] == [("cut", 3), ("whole", 5)]
    skipped = result["skipped"][0]["what"]
    assert "broke off" in skipped and "(1 question unanswered)" in skipped and result["num_queries"] == 3


def test_a_share_of_an_unknown_length(tmp_path: Path) -> None:
    """Only this video cannot be watched."""
    write_npy(tmp_path / "a.npy", videos(1, SECONDS)[0])
    write_npy(tmp_path / "b.npy", videos(1, 2 * SECONDS)[0])
    write_json(tmp_path / "ego4d_oe.json", [rvs_entry("a.npy", [3, 5]), rvs_entry("b.npy", [5])])

    def config_for(count: int) -> Config:
        if count == SECONDS:
            raise ConfigError("budget '25%' is a share of a length that is not known here")
        return Config(policy="full")

    result, lines = scripted("rvs", tmp_path, lambda prompt, times: "red", control=False, config_for=config_for)
    assert len(lines) == 1 and "not known here (2 questions unanswered)" in result["skipped"][0]["what"]


def test_chosen_tasks_and_parts(lay: Callable[..., Path]) -> None:
    questions = [real("a", "00:00:03", "A", "Counting"), real("b", "00:00:05", "A", "Event Understanding")]
    entry = {"video_path": "./real/sample_1/video.mp4", "questions": questions}
    data = lay("questions_real.json", [entry], "video.mp4", "real/sample_1/video.mp4")
    write_json(data / "questions_real_stream.json", [entry])  # the same questions in another form
    files = FORMATS["streamingbench"].annotation_files(data)
    assert files == [data / "questions_real.json"]
    result, lines = scripted("streamingbench", data, Script(b="A"), tasks=("Event Understanding",), control=False)
    assert [line["question"] for line in lines] == ["b?"] and result["num_queries"] == 1
    (data / "real/sample_1/video.mp4").unlink()
    with pytest.raises(ConfigError, match="none of the videos was found"):  # not any file called video.mp4
        scripted("streamingbench", data, Script(b="A"), tasks=("Event Understanding",), control=False)


def test_malformed_entries_are_named_and_skipped(lay: Callable[..., Path]) -> None:
    good = VIDEOMME[0]
    data = lay("videomme.json", [], "v.mp4")
    (data / "empty.mp4").touch()
    bad: list[tuple[Any, str]] = [
        ({**good, "question": ""}, "'question' is empty"),
        ({**good, "options": "red"}, "'options' is a text, not a list"),
        ({**good, "options": ["red", ["green"]]}, "'options' holds a list, not a text"),
        ({**good, "answer": "E"}, "the answer 'E' is none of the 4 options"),
        ({key: value for key, value in good.items() if key != "videoID"}, "'videoID' is missing"),
        ("text", "the entry is a text, not an object"),
        ({**good, "videoID": "gone"}, "video gone was not found"),
        ({**good, "videoID": "empty"}, "empty.mp4: the file is empty (1 question unanswered)"),
        ({**good, "question": "what is <video>?"}, "a marker of the model"),
        ({**good, "videoID": "v" * 300}, "was not found"),
        ({**good, "question": "half a \ud83d?"}, "'question' holds half a character"),
        ({**good, "options": ["red", "\ud83d"]}, "'options' holds half a character"),
        ({**good, "answer": "A man in red."}, "the answer 'A man in red.' is none of the 4 options"),
        ({**good, "answer": "B. Red"}, "the answer 'B. Red' is none of the 4 options"),
    ]
    lines = ["[", json.dumps(good) + ","]
    for entry, _ in bad:
        lines += ["", json.dumps(entry) + ","]
    lines += [json.dumps({**good, "question": "b?"}), ", {'broken'"]
    (data / "videomme.json").write_text("\n".join(lines))
    result, answered = scripted("videomme", data, Script(a="A", b="A"), control=False)
    assert {line["question"] for line in answered} == {"a?", "b?"}
    found = {problem["where"]: problem["what"] for problem in result["skipped"]}
    expected = {f"{data / 'videomme.json'}:{4 + 2 * i}": what for i, (_, what) in enumerate(bad)}
    expected[f"{data / 'videomme.json'}:{len(lines)}"] = "nothing from here on was read"
    assert found.keys() == expected.keys()
    for where, what in expected.items():
        assert what in found[where], (where, found[where])
    assert result["num_skipped"] == len(expected)
    text = (data / "out" / "summary.md").read_text()
    assert f"Skipped: {len(expected)}." in text and "'videoID' is missing" in text


def test_malformed_questions_leave_the_others(lay: Callable[..., Path]) -> None:
    questions = [
        real("good", "00:00:03", "A", "Counting"),
        real("bad", "soon", "A", "Counting"),
        {**real("worse", "00:00:03", "A", "Counting"), "options": ["one"]},
    ]
    data = lay("questions_real.json", [{"video_path": "v.mp4", "questions": questions}], "v.mp4")
    result, answered = scripted("streamingbench", data, Script(good="A"), control=False)
    assert len(answered) == 1
    assert [problem["what"] for problem in result["skipped"]] == [
        "question 2: 'time_stamp' is 'soon', not a time as HH:MM:SS",
        "question 3: 'options' has 1 options; allowed: 2 to 14",
    ]


def test_a_file_that_cannot_be_read_leaves_the_others(tmp_path: Path) -> None:
    """One problem each, however long they are."""
    good, binary, other = (tmp_path / f"{name}.json" for name in ("good", "binary", "other"))
    write_json(good, VIDEOMME)
    binary.write_bytes(b"\xff\xfe\x00")
    write_json(other, {"entries": VIDEOMME})
    found, problems = FORMATS["videomme"].read([binary, other, tmp_path / "gone.json", good])
    assert len(found) == 3 and [problem.where for problem in problems] == [
        f"{binary}:1", f"{other}:1", f"{tmp_path / 'gone.json'}:1"
    ]  # fmt: skip
    assert "cannot be read" in problems[0].what and "a JSON list of entries" in problems[1].what


def test_what_stands_behind_a_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "videomme.json"
    path.write_text(json.dumps(VIDEOMME[:1]) + "\n\n" + json.dumps(VIDEOMME[1:]))
    found, problems = FORMATS["videomme"].read([path])
    assert len(found) == 1 and problems == [Problem(f"{path}:3", "not read: it stands behind the list's end")]


def test_answers_to_questions_that_were_mended_are_left_out(lay: Callable[..., Path]) -> None:
    data = lay("videomme.json", VIDEOMME[:2], "v.mp4")
    script = Script(a="B", b="B")
    result, _ = scripted("videomme", data, script, control=False)
    assert averages(result, "strict")["per question"] == 0.5 and result["num_outdated"] == 0
    write_json(data / "videomme.json", [{**VIDEOMME[0], "answer": "B"}, VIDEOMME[1]])
    result, lines = scripted("videomme", data, script, control=False)
    assert len(lines) == 3 and averages(result, "strict")["per question"] == 1.0  # and not two thirds
    assert result["num_outdated"] == 1
    assert "1 answers to questions that have changed since" in (data / "out" / "summary.md").read_text()
    write_json(data / "test.json", VIDEOMME[2:])  # another file's questions do not touch these
    result, _ = scripted("videomme", data, Script(c="C"), control=False, files=(data / "test.json",))
    assert result["num_outdated"] == 0 and len(lines) == 3


def test_answers_to_nothing_but_mended_questions(lay: Callable[..., Path]) -> None:
    data = lay("videomme.json", VIDEOMME[:1], "v.mp4")
    scripted("videomme", data, Script(a="A"), control=False)
    write_json(data / "videomme.json", [{**VIDEOMME[0], "question": "what is <video>?"}])
    with pytest.raises(ConfigError, match="holds no answers but 1 to questions that have changed since"):
        scripted("videomme", data, Script(a="A"), control=False)


def test_a_choice_of_tasks_leaves_answers_as_they_are(lay: Callable[..., Path]) -> None:
    """Two videos, and one question that is asked twice: neither is another task's answer outdated, nor asked again."""
    one, two = real("a", "00:00:03", "A", "Counting"), real("b", "00:00:05", "A", "Event Understanding")
    asked = (("v", one), ("w", one), ("v", two), ("v", one))
    entries = [{"video_path": f"{name}.mp4", "questions": [question]} for name, question in asked]
    data = lay("questions_real.json", entries, "v.mp4", "w.mp4")
    script = Script(a="A", b="A")
    result, lines = scripted("streamingbench", data, script, control=False)
    assert len(lines) == result["num_queries"] == 4
    for tasks, count in (("Event Understanding",), 1), (("Counting",), 3), ((), 4):
        result, again = scripted("streamingbench", data, script, control=False, tasks=tasks)
        assert again == lines and result["num_outdated"] == 0 and result["num_queries"] == count


@pytest.mark.parametrize("change", [{"required": "x"}, {"task_type": "Counting"}, {"time_stamp": "00:00:04"}])
def test_what_decides_an_answer_is_part_of_its_key(lay: Callable[..., Path], change: dict[str, str]) -> None:
    entry = real("a", "00:00:03", "A", "Event Understanding")
    data = lay("questions_real.json", [{"video_path": "v.mp4", "questions": [entry]}], "v.mp4")
    scripted("streamingbench", data, Script(a="A"), control=False)
    write_json(data / "questions_real.json", [{"video_path": "v.mp4", "questions": [entry | change]}])
    result, _ = scripted("streamingbench", data, Script(a="A"), control=False)
    assert result["num_outdated"] == ("required" not in change)


@pytest.mark.parametrize("answer", ["B", "(B)", "B.", "B. green", "(B) green", "B: a green one", "B Green."])
def test_letters_that_are_answers(answer: str) -> None:
    assert letter(answer, ["red", "green", "blue"]) == "B"


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "videomme.jsonl"
    path.write_text(json.dumps(VIDEOMME[0]) + "\n{oops\n\n" + json.dumps(VIDEOMME[1]) + "\n")
    found, problems = FORMATS["videomme"].read([path])
    assert [video.where for video in found] == [f"{path}:1", f"{path}:4"]
    assert [problem.where for problem in problems] == [f"{path}:2"] and isinstance(problems[0], Problem)


def test_nothing_to_ask_is_an_error(lay: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no annotation file of MLVU"):
        FORMATS["mlvu"].annotation_files(tmp_path)
    data = lay("videomme.json", [VIDEOMME[0]])
    with pytest.raises(ConfigError, match="none of the videos was found"):
        scripted("videomme", data, Script())
    write_json(data / "videomme.json", [{}])
    with pytest.raises(ConfigError, match=r"no question can be asked: .*:2: 'videoID' is missing"):
        scripted("videomme", data, Script())
    assert Silent().problems == []


def test_an_empty_picture_is_an_unreadable_video(tmp_path: Path) -> None:
    (tmp_path / "1.png").touch()
    frame = _folder(tmp_path)[1]
    with pytest.raises(VideoError, match=r"1\.png: cannot be read as a picture"):
        frame(0)


def test_digits_that_are_no_number_are_no_index() -> None:
    with pytest.raises(Malformed, match="not the index of one of 3 options"):
        letter_at("²", ["a", "b", "c"], "answer")
    assert letter_at("2", ["a", "b", "c"], "answer") == "C"


@pytest.mark.parametrize(("retrieval", "roles"), [("mean_key", {"method", "control"}), ("none", {"method"})])
def test_only_the_control_itself_has_none_beside_it(tmp_path: Path, retrieval: Any, roles: set[str]) -> None:
    write_npy(tmp_path / "a.npy", videos(1, SECONDS)[0])
    write_json(tmp_path / "ego4d_oe.json", [rvs_entry("a.npy", [5])])
    recent = Config(policy="recent", retrieval=retrieval, budget=96)
    _, lines = scripted("rvs", tmp_path, lambda prompt, times: "red", config_for=lambda count: recent)
    assert {line["role"] for line in lines} == roles
