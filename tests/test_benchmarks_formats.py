# SPDX-License-Identifier: Apache-2.0
"""Every benchmark from files in its own form to a score that is known beforehand; what is malformed is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_kit import Silent, scripted, videos, write_folder, write_json, write_mp4, write_npy
from livevlm.benchmarks.registry import FORMATS
from livevlm.benchmarks.schema import Problem
from livevlm.cli.eval import TITLES
from livevlm.config import Config
from livevlm.errors import ConfigError

OPTIONS = ["red", "green", "blue", "white"]
LETTERED = ["A. red", "B. green", "C. blue", "D. white"]
SECONDS = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_mp4(path, videos(1, SECONDS)[0])
    return path.read_bytes()


@pytest.fixture
def lay(tmp_path: Path, clip: bytes) -> Callable[..., Path]:
    """Lays out a data set: an annotation file, and the same video under several names."""

    def lay(file: str, value: Any, *names: str) -> Path:
        write_json(tmp_path / file, value)
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(clip)
        return tmp_path

    return lay


class Script:
    """Replies by what a prompt holds; remembers how many seconds had been seen."""

    def __init__(self, **replies: str) -> None:
        self.replies = replies
        self.seen: dict[str, list[float]] = {}
        self.prompts: dict[str, str] = {}

    def __call__(self, prompt: str, times: list[float]) -> str:
        for word, reply in self.replies.items():
            if f"{word}?" in prompt:
                self.seen[word], self.prompts[word] = times, prompt
                return reply
        raise AssertionError(prompt)


def averages(result: dict[str, Any], metric: str) -> dict[str, float | None]:
    return {label: values[metric] for label, values in result["method"]["averages"].items()}


# ---------------------------------------------------------------- StreamingBench
def real(question: str, stamp: str, answer: str, task: str, options: list[str] = OPTIONS) -> dict[str, Any]:
    return {
        "task_type": task, "question": f"{question}?", "time_stamp": stamp, "answer": answer, "options": options,
        "required_ability": "working memory",
    }  # fmt: skip


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


# ---------------------------------------------------------------- OVO-Bench
def test_ovobench_in_its_three_groups(lay: Callable[..., Path]) -> None:
    def choice(number: int, task: str, time: float, gold: int) -> dict[str, Any]:
        question = f"q{number}?"
        return {
            "id": number, "task": task, "video": "COIN/v.mp4", "realtime": time, "question": question,
            "options": OPTIONS, "gt": gold, "answer": OPTIONS[gold],
        }  # fmt: skip

    rec = {
        "id": 7, "task": "REC", "video": "COIN/v.mp4", "activity": "jump", "start_times": [1], "end_times": [2],
        "test_info": [{"realtime": 3, "count": 1}, {"realtime": 6.5, "count": 12}],
    }  # fmt: skip
    ssr = {
        "id": 8, "task": "SSR", "video": "COIN/v.mp4", "tutorial": "tea", "all_steps": ["pour"], "start_time": [1],
        "end_time": [2], "test_info": [{"realtime": 2, "step": "pour", "type": 1}],
    }  # fmt: skip
    crr = {
        "id": 9, "task": "CRR", "video": "only/cut.mp4", "question": "who?", "answer": "x", "ask_time": 1,
        "clue_time": 5, "test_info": [{"realtime": 2, "type": 0}],
    }  # fmt: skip
    entries = [choice(1, "EPM", 4, 0), choice(2, "ASI", 5, 1), choice(3, "OCR", 6, 2), choice(4, "OCR", 20, 3), rec]
    data = lay("ovo_bench_new.json", [*entries, ssr, crr], "src_videos/COIN/v.mp4", "chunked_videos/9_0.mp4")
    seen: dict[str, float] = {}

    def reply(prompt: str, times: list[float]) -> str:
        told = {"q1": "All", "q2": "B", "q3": "C. blue", "q4": "A", "jump": "1", "pour": "Yes", "who": "no"}
        word = next(word for word in told if word in prompt)
        seen[f"{word}@{times[-1]:g}"] = len(times)
        return "1 or 2" if word == "jump" and times[-1] > 5 else told[word]

    result, _ = scripted("ovobench", data, reply, control=False)
    assert set(seen) == {"q1@4", "q2@5", "q3@6", "q4@11", "jump@3", "jump@7", "pour@2", "who@2"}
    groups = result["method"]["groups"]
    # Strict: EPM 0, ASI 1; OCR 1/2; REC 1/2, SSR 1, CRR 1. Official: "All" holds an A, "1 or 2" joins to 12, "no" is
    # not "No".
    assert {name: group["strict"] for name, group in groups.items()} == pytest.approx(
        {"backward": 0.5, "real-time": 0.5, "forward": 2.5 / 3}
    )
    assert {name: group["official"] for name, group in groups.items()} == pytest.approx(
        {"backward": 1.0, "real-time": 0.5, "forward": 2 / 3}
    )
    assert averages(result, "strict")["total, mean of the three groups"] == pytest.approx((1 + 2.5 / 3) / 3)
    assert averages(result, "official")["mean of real-time and backward"] == pytest.approx(0.75)


# ---------------------------------------------------------------- MLVU and the others
def test_mlvu_reports_both_averages(lay: Callable[..., Path]) -> None:
    def entry(question: str, task: str, answer: str) -> dict[str, Any]:
        return {
            "video": "m.mp4", "duration": 12, "question": f"{question}?", "candidates": OPTIONS, "answer": answer,
            "question_type": task,
        }  # fmt: skip

    plot = [entry("a", "plotQA", "red"), entry("b", "plotQA", "green"), entry("c", "plotQA", "blue")]
    data = lay("json/1_plotQA.json", plot, "video/1_plotQA/m.mp4", "video/6_anomaly_reco/m.mp4")
    write_json(data / "json/6_anomaly_reco.json", [entry("d", "anomaly_reco", "white")])
    script = Script(a="A) red", b="A", c="A", d="D")
    result, lines = scripted("mlvu", data, script)
    assert averages(result, "strict") == pytest.approx({"M-Avg (mean of tasks)": 2 / 3, "per question": 0.5})
    assert len(lines) == 8 and result["control"]["averages"]["per question"]["official"] == 0.5
    assert all(line["ask_time"] is None and line["seen_seconds"] == 11 for line in lines)
    assert lines[0]["prefix"] == "Best option: (" and "(A) red" in lines[0]["prompt"]


def test_mlvu_reads_the_rows_of_lmms_eval(lay: Callable[..., Path]) -> None:
    """Options in the question's own lines, the answer a letter."""
    row = {"video_name": "m.mp4", "duration": 12, "answer": "B", "task_type": "PQA"}
    questions = ["a?\n(A) red\n(B) green\n(C) blue", "b?\n(A) red", "c?\n(A) red\n(B) green"]
    rows = [{**row, "question": question} for question in questions]
    data = lay("test.jsonl", [], "videos/m.mp4")
    (data / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = Script(a="B", c="A")
    result, lines = scripted("mlvu", data, script, control=False)
    assert (lines[0]["question"], lines[0]["options"]) == ("a?", ["red", "green", "blue"])
    assert averages(result, "strict")["per question"] == 0.5 and "(B) green" in script.prompts["a"]
    assert result["skipped"][0]["where"] == f"{data / 'test.jsonl'}:2"


def test_mlvu_leaves_out_the_tasks_of_writing(tmp_path: Path) -> None:
    for name in ("1_plotQA", "7_topic_reasoning", "8_sub_scene", "9_summary"):
        write_json(tmp_path / f"json/{name}.json", [])
    found = FORMATS["mlvu"].annotation_files(tmp_path)
    assert [path.stem for path in found] == ["1_plotQA", "7_topic_reasoning"]


def test_a_letter_is_a_letter_also_where_options_are_letters(lay: Callable[..., Path]) -> None:
    """VideoMME's answer "A" is the first option, whatever the options say; MLVU's is the option that says so."""
    which = {"question": "which?", "answer": "A"}
    row = {"videoID": "v", "duration": "short", "options": ["A. D", "B. A", "C. B", "D. C"], **which}
    found, _ = FORMATS["videomme"].read([lay("videomme.json", [row]) / "videomme.json"])
    assert found[0].queries[0].answer == "A"
    found, _ = FORMATS["mlvu"].read(
        [lay("1_x.json", [{"video": "v", "candidates": ["D", "A", "3", "C"], **which}]) / "1_x.json"]
    )
    assert found[0].queries[0].answer == "B"
    count = {"video": "v", "candidates": ["1", "2", "3", "4"], "question": "how many?", "answer": 3}
    found, _ = FORMATS["mlvu"].read([lay("4_count.json", [count]) / "4_count.json"])
    assert found[0].queries[0].answer == "C"  # an option's text, not an index


OFFLINE = {
    "videomme": [
        {"videoID": "v", "question_id": f"00{i}-1", "duration": duration, "domain": "x", "sub_category": "y",
         "task_type": "Counting", "question": f"{word}?", "options": LETTERED, "answer": answer}
        for i, (word, duration, answer) in enumerate([("a", "short", "A"), ("b", "short", "B"), ("c", "long", "C")])
    ],
    "egoschema": [
        {"question_idx": str(i), "video_idx": "v", "question": f"{word}?", "option": LETTERED, "answer": answer}
        for i, (word, answer) in enumerate([("a", "0"), ("b", 1), ("c", "2"), ("open", None)])
    ],
    "longvideobench": [
        {"id": "v_0", "video_id": "v", "video_path": "v.mp4", "duration": 12.0, "duration_group": 15,
         "question": "a?", "question_category": "S2E", "candidates": OPTIONS, "correct_choice": 0},
        {"id": "v_1", "video_id": "v", "video_path": "v.mp4", "duration_group": 15, "question": "b?",
         "question_category": "S2E", "option0": "red", "option1": "green", "option2": "N/A", "correct_choice": 1},
        {"id": "v_2", "video_id": "v", "video_path": "v.mp4", "duration_group": 600, "question": "c?",
         "question_category": "T3O", "candidates": OPTIONS, "correct_choice": 2},
    ],
    "cgbench": [
        {"qid": i, "video_uid": "v", "question": f"{word}?", "choices": OPTIONS, "right_answer": answer,
         "answer": "text", "duration": 12, "domain": "x", "sub_category": "y", "clue_intervals": clue}
        for i, (word, answer, clue) in enumerate([("a", "A", [[10, 12]]), ("b", "B", [[1, 2]]), ("c", "C", [[0, 11]])])
    ],
}  # fmt: skip
FILES = {"videomme": "videomme.json", "egoschema": "egoschema.json", "longvideobench": "lvb_val.json",
         "cgbench": "cgbench_mini.json"}  # fmt: skip


@pytest.mark.parametrize("name", list(OFFLINE))
def test_offline_benchmarks(name: str, lay: Callable[..., Path]) -> None:
    data = lay(FILES[name], OFFLINE[name], "videos/v.mp4")
    script = Script(a="A", b="The answer is B", c="It is Blue", open="D")
    result, _ = scripted(name, data, script, control=False)
    # "It is Blue": strictly nothing; by the first letter of an option in it, B.
    official = 1 / 3 if name == "egoschema" else 2 / 3  # a letter or an option, and nothing else
    assert averages(result, "strict") == {"per question": pytest.approx(2 / 3)}
    assert averages(result, "official") == {"per question": pytest.approx(official)}
    if name in ("videomme", "longvideobench"):
        assert [group["strict"] for group in result["method"]["groups"].values()] in ([0.0, 1.0], [1.0, 0.0])
    if name == "egoschema":
        rows = (data / "out" / "submission.csv").read_text().split()
        assert rows == ["q_uid,answer", "v,0", "v,1", "v,-1", "v,3"]
    if name == "cgbench":
        assert result["method"]["evidence_found"] == pytest.approx(2 / 3)
    else:
        assert result["method"]["evidence_found"] is None


@pytest.mark.parametrize("name", [name for name in TITLES if name != "rvs"])
def test_the_conversations_form_runs_unchanged(name: str, lay: Callable[..., Path]) -> None:
    """As ReKV and HERMES write it: answers as texts, times of the questions, a path of another machine."""
    turns = [
        {"question": "a?", "choices": OPTIONS, "answer": "red", "end_time": 3.0, "task": "EPM"},
        {"question": "b?", "choices": OPTIONS, "answer": "green", "end_time": 7, "question_type": "OCR"},
    ]
    entry = {"video_id": 0, "video_path": "/data/x/videos/v.mp4", "duration": 12.0, "conversations": turns}
    file = {"streamingbench": "streamingbench_realtime.json", "mlvu": "dev_debug_mc.json"}.get(name, f"{name}.json")
    file = {"longvideobench": "lvb_val.json"}.get(name, file)
    again = {**entry, "video_id": 1, "conversations": [{**turns[0], "question": "c?"}]}
    data = lay(file, [entry, again], "videos/v.mp4")
    script = Script(a="A", b="A man, B)", c="B) A")
    result, lines = scripted(name, data, script, control=False)
    average = "per question" if name != "streamingbench" else "all, per question"
    assert averages(result, "strict")[average] == 1 / 3 and averages(result, "official")[average] == 2 / 3
    assert all(line["prefix"] == "Best option: (" and "(A) red" in line["prompt"] for line in lines)
    assert script.seen["a"][-1] == script.seen["c"][-1] == 3 and script.seen["b"][-1] == 7
    assert len({line["video"] for line in lines}) == 1  # one pass: both entries are about one video


def test_the_conversations_form_without_answers_or_with_clips(lay: Callable[..., Path]) -> None:
    """ReKV's EgoSchema has null for answers that are not public; a clip's times would be misread."""
    turn = {"question": "a?", "choices": OPTIONS, "answer": None}
    entries = [
        {"video_id": "v", "video_path": "v.mp4", "conversations": [turn, {**turn, "question": "b?", "answer": "blue"}]},
        {"video_id": "w", "video_path": "v.mp4", "clip": [3, 8], "conversations": [turn]},
        {"video_id": "v", "video_path": "v.mp4", "conversations": [{"question": "c?", "choices": OPTIONS}]},
    ]
    data = lay("egoschema.json", entries, "v.mp4")
    result, lines = scripted("egoschema", data, Script(a="D", b="C"), control=False)
    assert [(line["question"], line["strict"]) for line in lines] == [("a?", None), ("b?", True)]
    assert averages(result, "strict") == {"per question": 1.0}
    assert [problem["what"].split(":")[0] for problem in result["skipped"]] == ["'clip' is not supported", "turn 1"]


# ---------------------------------------------------------------- RVS: stacks and folders
def rvs_entry(path: str, ends: list[float], **more: Any) -> dict[str, Any]:
    turns = [{"question": f"q{end}?", "answer": "Red.", "start_time": 0, "end_time": end} for end in ends]
    return {"video_id": Path(path).stem, "video_path": path, "duration": SECONDS, "conversations": turns, **more}


def test_rvs_reads_stacks_and_folders(tmp_path: Path) -> None:
    video = videos(1, SECONDS)[0]
    write_npy(tmp_path / "movie/videos/tt1.npy", video)
    write_folder(tmp_path / "movie/videos/tt2", video)
    movie = {"clip_start_time": 4, "clip_end_time": 11}
    entries = [rvs_entry("/d/tt1.npy", [5, 9], **movie), rvs_entry("/d/tt2", [9], fps=2)]
    write_json(tmp_path / "movie/movienet_oe.json", entries)
    seen: list[list[float]] = []

    def reply(prompt: str, times: list[float]) -> str:
        seen.append(times)
        return "red"

    result, lines = scripted("rvs", tmp_path, reply, fps=0.5, control=False)
    assert seen == [[0, 2, 4], [0, 2, 4, 6, 8], [0, 2, 4]]  # pictures half a second apart
    assert [line["num_frames"] for line in lines] == [3, 5, 3]
    assert result["method"]["groups"]["movie"]["strict"] == 1.0 and result["judge"] == "none"


def test_a_stack_of_the_clip_alone_is_refused(tmp_path: Path) -> None:
    """Its questions' times count from the movie's start: they would be asked too late."""
    write_npy(tmp_path / "tt1.npy", videos(1, SECONDS)[0])
    write_npy(tmp_path / "tt2.npy", videos(1, SECONDS)[0])
    cut = rvs_entry("tt1.npy", [105], clip_start_time=100, clip_end_time=112)
    write_json(tmp_path / "movienet_oe.json", [{**cut, "duration": 900}, rvs_entry("tt2.npy", [5])])
    result, lines = scripted("rvs", tmp_path, lambda prompt, times: "red", control=False)
    assert len(lines) == 1 and "as the clip from 100 to 112 s is" in result["skipped"][0]["what"]
    assert result["skipped"][0]["where"] == f"{tmp_path / 'movienet_oe.json'}:2"


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


# ---------------------------------------------------------------- what is malformed
def test_malformed_entries_are_named_and_skipped(lay: Callable[..., Path]) -> None:
    good = OFFLINE["videomme"][0]
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


def test_what_stands_behind_a_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "videomme.json"
    path.write_text(json.dumps(OFFLINE["videomme"][:1]) + "\n\n" + json.dumps(OFFLINE["videomme"][1:]))
    found, problems = FORMATS["videomme"].read([path])
    assert len(found) == 1 and problems == [Problem(f"{path}:3", "not read: it stands behind the list's end")]


def test_answers_to_questions_that_were_mended_are_left_out(lay: Callable[..., Path]) -> None:
    data = lay("videomme.json", OFFLINE["videomme"][:2], "v.mp4")
    script = Script(a="B", b="B")
    result, _ = scripted("videomme", data, script, control=False)
    assert averages(result, "strict")["per question"] == 0.5 and result["num_outdated"] == 0
    write_json(data / "videomme.json", [{**OFFLINE["videomme"][0], "answer": "B"}, OFFLINE["videomme"][1]])
    result, lines = scripted("videomme", data, script, control=False)
    assert len(lines) == 3 and averages(result, "strict")["per question"] == 1.0  # and not two thirds
    assert result["num_outdated"] == 1
    assert "1 answers to questions that have changed since" in (data / "out" / "summary.md").read_text()
    write_json(data / "test.json", OFFLINE["videomme"][2:])  # another file's questions do not touch these
    result, _ = scripted("videomme", data, Script(c="C"), control=False, files=(data / "test.json",))
    assert result["num_outdated"] == 0 and len(lines) == 3


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "videomme.jsonl"
    path.write_text(json.dumps(OFFLINE["videomme"][0]) + "\n{oops\n\n" + json.dumps(OFFLINE["videomme"][1]) + "\n")
    found, problems = FORMATS["videomme"].read([path])
    assert [video.where for video in found] == [f"{path}:1", f"{path}:4"]
    assert [problem.where for problem in problems] == [f"{path}:2"] and isinstance(problems[0], Problem)


def test_nothing_to_ask_is_an_error(lay: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no annotation file of MLVU"):
        FORMATS["mlvu"].annotation_files(tmp_path)
    data = lay("videomme.json", [OFFLINE["videomme"][0]])
    with pytest.raises(ConfigError, match="none of the videos was found"):
        scripted("videomme", data, Script())
    write_json(data / "videomme.json", [{}])
    with pytest.raises(ConfigError, match=r"no question can be asked: .*:2: 'videoID' is missing"):
        scripted("videomme", data, Script())
    assert Silent().problems == []
