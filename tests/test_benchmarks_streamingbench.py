# SPDX-License-Identifier: Apache-2.0
"""StreamingBench from tables and JSON files to scores that are known beforehand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_kit import scripted, write_json
from eval_sets import LETTERED, Script, averages, real


def test_streamingbench_asks_at_the_time_stamps(lay: Callable[..., Path]) -> None:
    entry = {"time": "[0:00-0:12]", "video_categories": "x", "video_path": "./data/real/sample_1/video.mp4"}
    questions = [
        real("late", "00:00:09", "B", "Object Recognition"),
        real("early", "00:00:03", "C", "Counting", LETTERED),
        real("past", "0:05:00", "A", "Counting"),
    ]
    data = lay("questions_real.json", [{**entry, "questions": questions}], "real/sample_1/video.mp4")
    script = Script(late="B. green", early="The answer is C", past="D")
    result, lines = scripted("streamingbench", data, script, control=False)
    assert script.seen["early"] == [0, 1, 2, 3] and script.seen["late"][-1] == 9 and script.seen["past"][-1] == 11
    assert "C. blue" in script.prompts["early"] and "A. A." not in script.prompts["early"]
    # Strictly right: late and early. The official rule looks at the first character: late alone.
    found = averages(result, "strict")
    assert (found["real-time, mean of tasks"], found["real-time, per question"]) == (0.75, pytest.approx(2 / 3))
    assert found["all, per question"] == pytest.approx(2 / 3) and found["omni-source, mean of tasks"] is None
    assert averages(result, "official")["real-time, mean of tasks"] == 0.5
    assert {line["question"]: line["past_end"] for line in lines} == {"late?": False, "early?": False, "past?": True}
    assert result["method"]["num_past_end"] == 1 and result["num_queries"] == 3 and "control" not in result


def test_streamingbench_shows_the_last_seconds_only(lay: Callable[..., Path]) -> None:
    questions = [real("one", "00:00:04", "A", "Counting"), real("two", "00:00:10", "A", "Counting")]
    data = lay("questions_real.json", [{"video_path": "v.mp4", "questions": questions}], "v.mp4")
    script = Script(one="A", two="A")
    scripted("streamingbench", data, script, context=5.0)
    assert script.seen == {"one": [0, 1, 2, 3, 4], "two": [5, 6, 7, 8, 9, 10]}
    late = real("late", "00:01:00", "A", "Counting")  # the last seconds that there are
    questions = [real("between", "00:00:05", "A", "Counting"), late]
    write_json(data / "questions_real.json", [{"video_path": "v.mp4", "questions": questions}])
    shutil.rmtree(data / "out")
    script = Script(between="A", late="A")
    scripted("streamingbench", data, script, context=4.0, fps=0.5)
    assert script.seen == {"between": [2, 4], "late": [6, 8, 10]}


def test_streamingbench_repeats_earlier_questions_with_true_answers(lay: Callable[..., Path]) -> None:
    entries = [
        {"video_path": "v.mp4", "questions": [real("first", "00:00:02", "D", "SQA")]},
        {"video_path": "v.mp4", "questions": [real("second", "00:00:05", "A", "SQA")]},
    ]
    data = lay("questions_sqa.json", [entries], "videos/v.mp4")
    seen: list[str] = []

    def reply(prompt: str, times: list[float]) -> str:
        seen.append(prompt)
        return "A"

    result, _ = scripted("streamingbench", data, reply, control=False)
    assert "before" not in seen[0] and "Q: first?\nA: white" in seen[1] and "Question: second?" in seen[1]
    assert averages(result, "strict")["all, per question"] == 0.5
    assert averages(result, "strict")["real-time, mean of tasks"] is None  # none was asked


COLUMNS = "question_id,task_type,question,time_stamp,answer,options,frames_required,temporal_clue_type\n"


def row(question_id: str, task: str, question: str, stamp: str, answer: str, options: str = str(LETTERED)) -> str:
    return f'{question_id},{task},"{question}?",{stamp},{answer},"{options}",single,Current\n'


def test_streamingbench_reads_the_tables(lay: Callable[..., Path]) -> None:
    """As Hugging Face has them: the video in the question's id, options as Python writes a list."""
    visual, sqa = "Real-Time Visual Understanding", "Sequential Question Answering"
    odd = "['A. red', 'B. green or so', 'C. blue', 'near it', 'D. white', 'B. green']"  # broken and repeated
    rows = [
        row(f"{visual}_sample_1_1", "Counting", "well,\none", "00:03", "D", odd),
        row(f"{visual}_1", "Counting", "nameless", "00:00:03", "A"),
        "a,b\n",
        row(f"{visual}_sample_1_2", "Counting", "two", "0:00:05", "B", "['A.red', 'green', 'blue', 'white']"),
    ]
    data = lay("questions_real.json", [], f"{visual}/sample_1/video.mp4", "sqa/sample_1/video.mp4")
    (data / "Real_Time_Visual_Understanding.csv").write_text(COLUMNS + "".join(rows))
    turns = [row(f"{sqa}_sample_1_{i}", sqa, word, "00:00:05", "C") for i, word in enumerate(("first", "second"))]
    (data / "Sequential_Question_Answering.csv").write_text(COLUMNS + "".join(turns))
    script = Script(one="D", two="A", second="C", first="C")
    result, _ = scripted("streamingbench", data, script, control=False)
    found = averages(result, "official")
    assert found["real-time, per question"] == 0.5 and found["all, per question"] == 0.75
    assert script.seen == {"one": [0, 1, 2, 3]} | {word: [0, 1, 2, 3, 4, 5] for word in ("two", "first", "second")}
    assert "B. green or so\nC. blue near it\nD. white\n" in script.prompts["one"]
    assert "A. red\nB. green\n" in script.prompts["two"]
    assert "Q: first?\nA: blue" in script.prompts["second"] and "before" not in script.prompts["first"]
    skipped = {problem["where"].rpartition(":")[2]: problem["what"] for problem in result["skipped"]}
    assert skipped["4"].startswith("'question_id' is") and skipped["5"] == "2 fields; the first line names 8"
    # Without its own, a part's samples would be those of another part.
    shutil.rmtree(data / "sqa")
    (data / f"{visual}/sample_1").rename(data / "sample_1")
    shutil.rmtree(data / "out")
    result, lines = scripted("streamingbench", data, script, control=False)
    assert {line["question"] for line in lines} == {"well,\none?", "two?"}
    assert any("was found only as" in problem["what"] for problem in result["skipped"])


def test_streamingbench_counts_groups_as_the_paper_does(lay: Callable[..., Path]) -> None:
    """Two tasks of the omni file are contextual; "omni" is the mean of the others."""
    tasks = {"a": "Emotion Recognition", "b": "Emotion Recognition", "c": "Scene Understanding"}
    tasks["d"] = "Misleading Context Understanding"
    questions = [real(word, "00:00:03", "A", task) for word, task in tasks.items()]
    entry = {"video_path": "./videos/sample_2_Scene_Understanding.mp4", "questions": questions}
    data = lay("questions_omni.json", [entry], "Scene Understanding/sample_2/video.mp4")  # not renamed
    result, _ = scripted("streamingbench", data, Script(a="A", b="B", c="B", d="A"), control=False)
    assert averages(result, "strict")["omni-source, mean of tasks"] == 0.25
    assert {name: group["strict"] for name, group in result["method"]["groups"].items()} == {
        "omni": pytest.approx(1 / 3),
        "contextual": 1.0,
    }


def test_streamingbench_polls_until_the_moment(lay: Callable[..., Path]) -> None:
    def item(question: str, start: str, truth: str) -> dict[str, Any]:
        return {
            "task_type": "Proactive Output", "question": f"{question}?", "time_stamp": start,
            "ground_truth_time_stamp": truth, "ground_truth_output": "GOAL",
        }  # fmt: skip

    questions = [
        item("good", "00:00:02", "00:00:05"),
        item("slow", "00:00:02", "00:00:03"),
        item("never", "00:00:01", "0:00:03"),
    ]
    data = lay("questions_proactive.json", [{"video_path": "v.mp4", "questions": questions}], "v.mp4")
    polls: dict[str, list[float]] = {"good": [], "slow": [], "never": []}

    def reply(prompt: str, times: list[float]) -> str:
        word = next(word for word in polls if f"{word}?" in prompt)
        if 'Is it the right time now to output "GOAL"' not in prompt:
            return "the GOAL" if word == "good" else "GOAL"
        polls[word].append(times[-1])
        return "No... yes" if word != "never" and times[-1] == 6 else "No"

    result, lines = scripted("streamingbench", data, reply, control=False)
    assert polls == {"good": [3, 4, 5, 6], "slow": [3, 4, 5, 6], "never": [2, 3, 4, 5, 6, 7]}
    found = {line["question"]: (line["said_at"], line["strict"], line["official"]) for line in lines}
    # Three seconds late is too late; "the GOAL" holds the output, but is not it.
    assert found == {"good?": (6, False, True), "slow?": (6, False, False), "never?": (None, False, False)}
    assert averages(result, "official")["all, per question"] == pytest.approx(1 / 3)
    shutil.rmtree(data / "out")
    polls["never"].clear()
    scripted("streamingbench", data, reply, control=False, fps=0.5)
    assert polls["never"] == [2, 4, 6]  # where no frame is new, the reply is known


def test_streamingbench_knows_both_names_of_the_proactive_task(lay: Callable[..., Path]) -> None:
    columns = "question_id,task_type,question,time_stamp,ground_truth_time_stamp,ground_truth_output"
    rows = [f"{name} Output_sample_1_{i},P,{name}?,0:02,0:05,GOAL" for i, name in enumerate(("Proactive", "Active"))]
    data = lay("x.json", [], "Proactive Output/sample_1/video.mp4")
    (data / "Proactive_Output.csv").write_text("\n".join([columns, *rows]))
    result, lines = scripted("streamingbench", data, lambda prompt, times: "Yes, GOAL", control=False)
    assert [line["said_at"] for line in lines] == [3, 3] and result["num_skipped"] == 0
    assert averages(result, "official")["all, per question"] == 1.0
