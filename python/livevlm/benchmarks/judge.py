# SPDX-License-Identifier: Apache-2.0
"""Who decides whether an open answer is right: a model behind an OpenAI-compatible address, a local one, or nobody."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from livevlm.errors import ConfigError, LiveVLMError

WORDING = "livevlm-2"  # part of a judge's name: other instructions are another judge
INSTRUCTIONS = (
    "You compare an answer to a question about a video with the true answer. Meaning counts, not wording: synonyms and "
    'paraphrases are right. Reply with one JSON object and nothing else, such as {"pred": "yes", "score": 4}: '
    '"pred" is "yes" if the answer is right, else "no"; "score" is a whole number from 0 (wrong) to 5 (the same).'
)
TRIES, PATIENCE, TIMEOUT = 5, 2.0, 120.0
REFUSED = (400, 413, 422)  # this question, for what is in it or how long it is; other questions may pass
MAX_TOKENS = 300


class JudgeError(LiveVLMError):
    """The judge cannot be reached, or does not judge."""


@dataclass(frozen=True)
class Verdict:
    """`right` and `score` are None if the judge refused the question, or its reply could not be understood."""

    right: bool | None
    score: int | None
    reply: str


class Judge(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def place(self) -> str:
        """Where it is: logged, but the same judge may move."""
        ...

    def __call__(self, question: str, answer: str, reply: str) -> Verdict: ...


def check(judge: Judge) -> None:
    """Asks what is beyond doubt, so that a wrong address, model or key shows before a video is watched.

    Raises:
        JudgeError: no verdict came.
    """
    found = judge("What colour is the ball?", "red", "red")
    if found.right is None:
        said = found.reply[:200]
        raise JudgeError(f"judge {judge.name!r} at {judge.place}: no verdict on whether red is red, but {said!r}")


def messages(question: str, answer: str, reply: str) -> list[dict[str, str]]:
    facts = f"Question: {question}\nTrue answer: {answer}\nAnswer to judge: {reply}"
    return [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": facts}]


def verdict(said: str) -> Verdict:
    """Finds the last `pred` and `score` in JSON or in a Python dictionary, behind what was thought aloud."""
    decided = "" if "<think>" in said and "</think>" not in said else said.rpartition("</think>")[2]
    right = re.findall(r"pred['\"]?\s*[:=]\s*['\"]?(yes|no)\b", decided, re.IGNORECASE)
    score = re.findall(r"score['\"]?\s*[:=]\s*['\"]?([0-5])(?:\.\d+)?\b", decided, re.IGNORECASE)
    if not right or not score:
        return Verdict(None, None, said)
    return Verdict(right[-1].lower() == "yes", int(score[-1]), said)


@dataclass(frozen=True)
class RemoteJudge:
    """A chat model at `url`, such as https://api.openai.com/v1 or http://localhost:8000/v1."""

    url: str
    model: str
    key: str | None = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.model}@{WORDING}"

    @property
    def place(self) -> str:
        return self.url

    def __call__(self, question: str, answer: str, reply: str) -> Verdict:
        body = {
            "model": self.model,
            "messages": messages(question, answer, reply),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        said = self._post(json.dumps(body).encode())
        try:
            return verdict(str(json.loads(said)["choices"][0]["message"]["content"]))
        except (ValueError, KeyError, IndexError, TypeError):
            return Verdict(None, None, said)

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                    return bytes(response.read()).decode(errors="replace")
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code in REFUSED:
                    return problem
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
            if attempt + 1 < TRIES:
                time.sleep(PATIENCE * 2**attempt)
        raise JudgeError(f"judge {self.model!r} at {self.url}: {problem}; start again to go on from here")


class LocalJudge:
    """A transformers chat model, on the device of the model that is judged; greedy."""

    def __init__(self, path: str, device: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"no judge could be loaded from {path!r}: {str(error).splitlines()[0]}") from None
        self.name, self.place = f"local:{path}@{WORDING}", "here"

    def __call__(self, question: str, answer: str, reply: str) -> Verdict:
        asked = self.tokenizer.apply_chat_template(
            messages(question, answer, reply), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        out = self.model.generate(**asked, max_new_tokens=MAX_TOKENS, do_sample=False)
        return verdict(self.tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))


@dataclass(frozen=True)
class JudgeChoice:
    """A judge that was asked for, by its name, before anything is loaded."""

    url: str | None = None
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"

    @property
    def name(self) -> str:
        if self.model is None:
            return "none"
        return f"{self.model}@{WORDING}" if self.url else f"local:{self.model}@{WORDING}"

    def checked(self) -> JudgeChoice:
        if self.url is not None and self.model is None:
            raise ConfigError("--judge-url needs --judge-model, the name of a model there")
        if self.url is not None and re.match(r"https?://[^/]", self.url) is None:
            raise ConfigError(f"--judge-url {self.url!r} must begin with http:// or https:// and a host")
        if self.model is not None and self.url is None and not Path(self.model).is_dir():
            raise ConfigError(f"--judge-model {self.model!r} is no folder; a model elsewhere needs --judge-url")
        return self

    def load(self, device: Any) -> Judge | None:
        if self.model is None:
            return None
        if self.url is None:
            return LocalJudge(self.model, device)
        return RemoteJudge(self.url, self.model, os.environ.get(self.key_variable))
