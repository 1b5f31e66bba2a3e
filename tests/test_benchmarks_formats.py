# SPDX-License-Identifier: Apache-2.0
"""Every other benchmark from files in its own form to a score that is known beforehand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_kit import scripted, videos, write_folder, write_json, write_mp4, write_npy
from eval_sets import LETTERED, OPTIONS, SECONDS, VIDEOMME, Script, averages, rvs_entry
from livevlm.benchmarks.registry import FORMATS
from livevlm.cli.eval import TITLES
from livevlm.errors import ConfigError


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
    "videomme": VIDEOMME,
    "egoschema": [
        {"question_idx": str(i), "video_idx": "v", "question": f"{word}?", "option": LETTERED, "answer": answer}
        for i, (word, answer) in enumerate([("a", "0"), ("b", 1), ("c", "2")])
    ] + [{"q_uid": "v", "question": "open?"} | {f"option {i}": text for i, text in enumerate([*OPTIONS, "black"])}],
    "longvideobench": [
        {"id": "v_0", "video_id": "v", "video_path": "v.mp4", "duration": 12.0, "duration_group": 15,
         "question": "a?", "question_category": "S2E", "candidates": OPTIONS, "correct_choice": 0},
        {"id": "v_1", "video_id": "v", "video_path": "v.mp4", "duration_group": 600, "question": "b?",
         "question_category": "S2E", "option0": "red", "option1": "green", "option2": "N/A", "correct_choice": 1},
        {"id": "v_2", "video_id": "v", "video_path": "v.mp4", "duration_group": 3600, "question": "c?",
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
    # EgoSchema takes a letter or an option, and nothing else.
    official = 1 / 3 if name == "egoschema" else 2 / 3
    assert averages(result, "strict") == {"per question": pytest.approx(2 / 3)}
    assert averages(result, "official") == {"per question": pytest.approx(official)}
    groups = {name: group["strict"] for name, group in result["method"]["groups"].items()}
    if name == "longvideobench":
        assert list(groups.items()) == [("15", 1.0), ("600", 1.0), ("3600", 0.0)]  # by seconds, not by letters
    if name == "videomme":
        assert groups == {"short": 1.0, "long": 0.0}
    if name == "egoschema":
        assert "E. black" in script.prompts["open"]
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


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("videomme", "videomme/test-00000-of-00001.parquet"),
        ("longvideobench", "validation-00000-of-00001.parquet"),
        ("cgbench", "data/test-00000-of-00001.parquet"),
        ("egoschema", "Subset/test-00000-of-00001.parquet"),
    ],
)
def test_parquet(name: str, file: str, lay: Callable[..., Path]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = lay("readme.json", [], "videos/v.mp4")
    (data / file).parent.mkdir(exist_ok=True)
    rows = [row for row in OFFLINE[name][:3] if "option0" not in row]  # a table's rows have the same columns
    rows = [row | {"answer": str(row.get("answer"))} for row in [*rows, {**rows[0], "question": ""}]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), data / file)
    result, lines = scripted(name, data, Script(a="A", b="B", c="A"), control=False)
    assert len(lines) == len(rows) - 1 and all(line["strict"] == (line["question"] != "c?") for line in lines)
    assert [problem["where"] for problem in result["skipped"]] == [f"{data / file}:{len(rows)}"]
    (data / file).write_bytes(b"PAR1 no more")
    _, problems = FORMATS[name].read([data / file])
    assert problems[0].where == f"{data / file}:1" and "cannot be read" in problems[0].what


def test_parquet_without_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'livevlm\[parquet\]'"):
        FORMATS["videomme"].read([tmp_path / "test.parquet"])


def test_egoschema_with_its_public_answers(lay: Callable[..., Path]) -> None:
    """Two of three are public: these are scored, and can be asked alone."""
    numbered = {f"option {i}": text for i, text in enumerate([*OPTIONS, "black"])}
    entries = [{"q_uid": uid, "question": f"{uid}?", **numbered} for uid in ("a", "b", "c")]
    data = lay("questions.json", entries, "videos/a.mp4", "videos/b.mp4", "videos/c.mp4")
    write_json(data / "subset_answers.json", {"a": 0, "c": 4})
    script = Script(a="A", b="B", c="D")
    result, lines = scripted("egoschema", data, script, control=False, tasks=("subset",))
    assert averages(result, "strict") == {"per question": 0.5} and len(lines) == 2
    result, lines = scripted("egoschema", data, script, control=False)
    assert averages(result, "strict") == {"per question": 0.5} and len(lines) == 3
    assert (data / "out" / "submission.csv").read_text().split() == ["q_uid,answer", "a,0", "c,3", "b,1"]
    (data / "subset_answers.json").write_text("{")
    _, problems = FORMATS["egoschema"].read([data / "questions.json"])
    assert len(problems) == 3 and "subset_answers.json, which belongs to it, cannot be read" in problems[0].what


# ---------------------------------------------------------------- RVS: stacks and folders
def test_rvs_reads_the_files_of_vstream_qa(tmp_path: Path) -> None:
    """Times count from the start of the whole video, pictures from the start of the clip."""
    write_folder(tmp_path / "vstream-realtime/ego4d_frames/clip_2", videos(1, SECONDS)[0])

    def entry(number: int, video: str, end: float) -> dict[str, Any]:
        return {
            "id": f"q{number}", "video_id": video, "video_name": "w", "question": "what?", "answer": "Red.",
            "answer_type": "Object", "start_time": 0, "end_time": end,
        }  # fmt: skip

    folder = tmp_path / "vstream-realtime"
    asked = [entry(0, "clip_2", 603), entry(1, "clip_2", 609), entry(2, "clip_2", 20), entry(3, "clip_9", 603)]
    write_json(folder / "test_qa_ego4d.json", asked)
    write_json(folder / "rvs_ego.json", [
        {"video_id": f"clip_{i}", "original_video": "w", "start_time": 300 * i, "end_time": 300 * (i + 1)}
        for i in range(3)
    ])  # fmt: skip
    result, lines = scripted("rvs", tmp_path, lambda prompt, times: "red", control=False)
    assert [(line["name"], line["ask_time"], line["seen_seconds"], line["strict"]) for line in lines] == [
        ("q0", 3, 3, True), ("q1", 9, 9, True)
    ]  # fmt: skip
    assert {(line["task"], line["group"]) for line in lines} == {("Object", "ego")}
    problems = [problem["what"] for problem in result["skipped"]]
    assert problems[0] == "'end_time' is 20, not within its clip, from 600 to 900"
    assert "'clip_9' is not in" in problems[1] and len(problems) == 2
    write_json(folder / "rvs_ego.json", 5)
    _, found = FORMATS["rvs"].read([folder / "test_qa_ego4d.json"])
    assert {problem.what for problem in found} == {"'rvs_ego.json' is 5, not a list of at least one item"}
    (folder / "rvs_ego.json").unlink()
    _, found = FORMATS["rvs"].read([folder / "test_qa_ego4d.json"])
    assert len(found) == 4 and "rvs_ego.json, which belongs to it, cannot be read" in found[0].what


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


@pytest.mark.parametrize("name", ["tt1.npy", "tt1.mp4"])
def test_a_clip_alone_is_refused(tmp_path: Path, name: str) -> None:
    """Its questions' times count from the movie's start: they would be asked too late."""
    video = videos(1, SECONDS)[0]
    write_npy(tmp_path / name, video) if name.endswith("npy") else write_mp4(tmp_path / name, video)
    write_npy(tmp_path / "tt2.npy", video)
    cut = rvs_entry(name, [105], clip_start_time=100, clip_end_time=112)
    write_json(tmp_path / "movienet_oe.json", [{**cut, "duration": 900}, rvs_entry("tt2.npy", [5])])
    result, lines = scripted("rvs", tmp_path, lambda prompt, times: "red", control=False)
    assert len(lines) == 1 and "as the clip from 100 to 112 s is" in result["skipped"][0]["what"]
    assert result["skipped"][0]["where"] == f"{tmp_path / 'movienet_oe.json'}:2"
