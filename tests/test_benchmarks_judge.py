# SPDX-License-Identifier: Apache-2.0
"""Judges of open answers: behind an address, local, gone."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

import livevlm
from eval_kit import answers, scripted, videos, write_json, write_npy
from livevlm.benchmarks import judge as judging
from livevlm.benchmarks.judge import JudgeChoice, JudgeError, LocalJudge, RemoteJudge
from livevlm.errors import ConfigError


class Server(BaseHTTPRequestHandler):
    """Judges like a strict chat model; the first call fails, as a busy one does."""

    calls: list[dict[str, Any]] = []  # noqa: RUF012
    failures = 1
    refusals: dict[str, int] = {}  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Server.failures:
            Server.failures -= 1
            self.send_error(503)
            return
        Server.calls.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
        truth, reply = (line.split(": ", 1)[1] for line in body["messages"][1]["content"].splitlines()[1:3])
        if truth in Server.refusals:
            self.send_error(Server.refusals[truth])
            return
        said = '{"pred": "yes", "score": 5}' if truth == reply else '{"pred": "no", "score": 1}'
        message = {"content": said if truth != "?" else "hm"} if truth != "none" else {"refusal": "no"}
        content = json.dumps({"choices": [{"message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(judging, "PATIENCE", 0.01)
    Server.calls, Server.failures, Server.refusals = [], 1, {}
    with HTTPServer(("127.0.0.1", 0), Server) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


def test_a_judge_decides_open_answers(server: str, tmp_path: Path) -> None:
    write_npy(tmp_path / "v.npy", videos(1, 6)[0])
    turns = [{"question": f"q{i}?", "answer": gold, "end_time": 3} for i, gold in enumerate(["red", "blue", "?"])]
    write_json(tmp_path / "ego4d_oe.json", [{"video_id": "v", "video_path": "v.npy", "conversations": turns}])
    judge = RemoteJudge(server, "strict", "secret")
    assert "secret" not in repr(judge)
    result, lines = scripted("rvs", tmp_path, lambda prompt, times: "red", judge, control=False)
    assert {(line["judge"], line["judge_place"]) for line in lines} == {("strict@livevlm-2", server)}
    found = {line["question"]: (line["judged"], line["judge_score"]) for line in lines}
    assert found == {"q0?": (True, 5), "q1?": (False, 1), "q2?": (None, None)}
    assert result["method"]["averages"]["per question"]["judged"] == 0.5  # what it did not decide is not counted
    assert result["method"]["judge_score"] == 3 and result["method"]["num_undecided"] == 1
    assert len(Server.calls) == 4  # the first one asks what is beyond doubt
    first = Server.calls[0]
    assert (first["path"], first["key"], first["model"]) == ("/v1/chat/completions", "Bearer secret", "strict")
    assert "judged" in (tmp_path / "out" / "summary.md").read_text()


def test_a_judge_that_goes_away_ends_the_run(server: str, tmp_path: Path) -> None:
    """What was judged stays; what was not is asked again."""
    write_npy(tmp_path / "v.npy", videos(1, 6)[0])
    turns = [{"question": f"q{end}?", "answer": gold, "end_time": end} for end, gold in ((2, "red"), (4, "blue"))]
    write_json(tmp_path / "ego4d_oe.json", [{"video_id": "v", "video_path": "v.npy", "conversations": turns}])
    judge = RemoteJudge(server, "strict", None)
    Server.refusals = {"blue": 503}
    with pytest.raises(JudgeError, match=re.escape(f"judge 'strict' at {server}: HTTP 503")):
        scripted("rvs", tmp_path, lambda prompt, times: "red", judge, control=False)
    assert [line["question"] for line in answers(tmp_path / "out")] == ["q2?"]
    Server.refusals = {}
    _, lines = scripted("rvs", tmp_path, lambda prompt, times: "red", judge, control=False)
    assert [(line["question"], line["judged"]) for line in lines] == [("q2?", True), ("q4?", False)]


def test_a_question_that_the_judge_refuses_is_undecided(server: str, tmp_path: Path) -> None:
    """Too long, against its rules, no text in its reply: the others are judged, and nothing is asked twice."""
    write_npy(tmp_path / "v.npy", videos(1, 6)[0])
    golds = ["red", "long", "rude", "none"]
    turns = [{"question": f"{gold}?", "answer": gold, "end_time": 3} for gold in golds]
    write_json(tmp_path / "ego4d_oe.json", [{"video_id": "v", "video_path": "v.npy", "conversations": turns}])
    Server.refusals = {"long": 413, "rude": 400}
    judge = RemoteJudge(server, "strict", None)
    for _ in range(2):
        result, lines = scripted("rvs", tmp_path, lambda prompt, times: "red", judge, control=False)
        found = {line["question"]: (line["judged"], line["judge_reply"][:8]) for line in lines}
        assert found["red?"] == (True, '{"pred":') and found["none?"] == (None, '{"choice')
        assert found["long?"] == (None, "HTTP 413") and found["rude?"] == (None, "HTTP 400")
        assert result["method"]["num_undecided"] == 3 and len(lines) == 4
    assert len(Server.calls) == 5  # of two runs: beyond doubt, and each question once


@pytest.mark.parametrize("code", [401, 404, 400])
def test_a_judge_that_does_not_judge_shows_before_a_video_is_watched(server: str, tmp_path: Path, code: int) -> None:
    write_npy(tmp_path / "v.npy", videos(1, 6)[0])
    turns = [{"question": "q?", "answer": "red", "end_time": 3}]
    write_json(tmp_path / "ego4d_oe.json", [{"video_id": "v", "video_path": "v.npy", "conversations": turns}])
    Server.refusals = {"red": code}
    with pytest.raises(JudgeError, match=f"{re.escape(server)}: .*HTTP {code}"):
        scripted("rvs", tmp_path, lambda prompt, times: pytest.fail("asked"), RemoteJudge(server, "strict", None))


def test_a_judge_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "PATIENCE", 0.0)
    with pytest.raises(JudgeError, match=re.escape("judge 'j' at http://127.0.0.1:9/v1")):
        judging.check(RemoteJudge("http://127.0.0.1:9/v1", "j", None))


def test_a_local_judge(tmp_path: Path) -> None:
    """A model of random weights says nothing that can be understood: undecided, and not counted."""
    tokenizer = livevlm.load("tiny", device="cpu").processor.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "judge")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "judge")
    judge = LocalJudge(str(tmp_path / "judge"), "cpu")
    found = judge("what ?", "red", "blue")
    assert judge.name == f"local:{tmp_path / 'judge'}@livevlm-2" == JudgeChoice(model=str(tmp_path / "judge")).name
    assert found.right is None and found.score is None
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no judge could be loaded"):
        LocalJudge(str(tmp_path / "none"), "cpu")


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        ("{'pred': 'no', 'score': 1}", False, 1),
        ('{"pred": "yes", "score": 4.0}', True, 4),
        ('I reply like {"pred": "yes", "score": 4}. So: {"pred": "no", "score": 0}', False, 0),
        ('<think>like {"pred": "yes", "score": 4}?</think>{"pred": "no", "score": 0}', False, 0),
        ('<think>It asks for {"pred": "yes", "score": 4}, and', None, None),  # cut off before it decided
        ('<think>{"pred": "yes", "score": 4}</think>I cannot tell.', None, None),
        ("pred: yes", None, None),
    ],
)
def test_the_last_verdict_counts_and_no_thought(said: str, right: bool | None, score: int | None) -> None:
    assert judging.verdict(said) == judging.Verdict(right, score, said)
