# SPDX-License-Identifier: Apache-2.0
"""What the model is asked. The wording is ours; its form is each benchmark's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from livevlm.benchmarks.schema import LETTERS, Query


@dataclass(frozen=True)
class Prompt:
    """How a multiple-choice question is put.

    Attributes:
        template: text with `{question}` and `{options}`.
        option: how one option is written, with `{letter}` and `{text}`.
        between: what stands between two options.
        prefix: how the answer begins; the model goes on behind it. Not part of the reply.
    """

    template: str
    option: str = "{letter}. {text}"
    between: str = "\n"
    prefix: str = ""


# The form that ReKV brought in and that those after it use: the answer begins with an open bracket.
BEST_OPTION = Prompt(
    "Question: {question}\nOptions:\n{options}\nGive only the best option.",
    "({letter}) {text}",
    prefix="Best option: (",
)
LETTER_ONLY = Prompt(
    "Look at the video and answer the question. Reply with the letter of the right option and nothing else.\n\n"
    "Question: {question}\n\nOptions:\n{options}\n\nThe best option is:"
)
LETTER_ONLY_ONE_LINE = Prompt(
    "Question: {question}\nOptions: {options};\nReply with your option's letter (such as A, B, C) and nothing else.",
    between="; ",
)


@dataclass(frozen=True)
class Prompts:
    """How multiple choice is put: in the benchmark's own form, and where its file is in that of ReKV and HERMES."""

    official: Prompt
    rekv: Prompt = BEST_OPTION

    def of(self, query: Query) -> Prompt:
        return self.rekv if query.form == "rekv" else self.official

    def changed(self, template: str | None, prefix: str | None) -> Prompts:
        """With a text or a beginning of the answer that was asked for; a new text brings no beginning of its own."""

        def one(prompt: Prompt) -> Prompt:
            if template is not None:
                prompt = replace(prompt, template=template, prefix="")
            return prompt if prefix is None else replace(prompt, prefix=prefix)

        return Prompts(one(self.official), one(self.rekv))


POLL = '{question}\nIs it the right time now to output "{output}"? Reply only with yes or no.'
OUTPUT = "{question}\nIt is the right time now. Reply with the required output and nothing else."


def written(query: Query, prompt: Prompt) -> str:
    """The question as the model gets it. By `replace`: a question may hold braces."""
    question = query.text
    if query.kind == "choice":
        options = prompt.between.join(
            prompt.option.replace("{letter}", letter).replace("{text}", text)
            for letter, text in zip(LETTERS, query.options, strict=False)
        )
        parts = prompt.template.split("{options}")
        question = options.join(part.replace("{question}", query.text) for part in parts)
    return history(query) + question


def history(query: Query) -> str:
    """Earlier questions about the video with their true answers."""
    if not query.history:
        return ""
    turns = "\n".join(f"Q: {question}\nA: {answer}" for question, answer in query.history)
    return f"These questions about the video were asked and answered before:\n{turns}\n\n"
