# SPDX-License-Identifier: Apache-2.0
"""LiveCache: a transformers Cache whose past is a stream's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from livevlm import hooks
from livevlm.attention import MOST_ANGLES, Read, Turn
from livevlm.buffers import BUCKETS
from livevlm.clip_pass import Clip, remember
from livevlm.config import Config
from livevlm.errors import ConfigError, FrameError, QuestionError, StateError
from livevlm.generate import checked_generate
from livevlm.graph_pool import GraphPool
from livevlm.ingest import ClipReader
from livevlm.live_layer import LiveLayer
from livevlm.memory import Memory
from livevlm.models import adapter_for
from livevlm.policies import QueryWindow, policy_for
from livevlm.policies.history import SlotHistory
from livevlm.replay import Replay
from livevlm.retrieval import Retrieval
from livevlm.rope import Rope
from livevlm.spread import spread
from livevlm_kernels import backends

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class LiveCache(Cache):
    """The memory of one stream, in the form of a transformers cache.

    To `generate` it looks empty before every question: the memory is attended to, but it is not part of the sequence
    that transformers counts, slices and masks. So none of the ways in which a pre-filled cache goes silently wrong
    there (`inputs_embeds`, a missing mask, a short prompt) can happen, and the question and its answer are forgotten
    when `generate` returns.

        cache = LiveCache(model, Config(budget=12_000))
        model.generate(**inputs, past_key_values=cache, max_new_tokens=64)    # prompt and video, as before
        _, question = Processor.wrap(processor).prompt("And now?")            # chat text after the video, as token ids
        model.generate(input_ids=question[None], past_key_values=cache, max_new_tokens=64)

    or, frame by frame, `prefill_prompt` once, then `push` at any time and `generate` with questions. A prompt with a
    video is taken by an empty cache only. `generate` runs transformers' own loop; `livevlm.Stream` does all this for
    you, and answers by CUDA graphs.

    Args:
        model: a supported transformers model; its `generate` and its language model's `forward` are
            wrapped, for calls with a LiveCache only.
        config: settings; `livevlm.Config()` if None.

    Raises:
        ModelError: the model is not supported.
        ConfigError: the budget does not fit the model, `attention` names a backend that is not there, or `graphs` is
            "on" where nothing can be captured.
    """

    def __init__(self, model: nn.Module, config: Config | None = None) -> None:
        self.config = config or Config()
        self.adapter = adapter_for(model)
        shape = self.adapter.kv_shape()
        if shape.dtype not in FLOATS and self.config.policy != "full":
            allowed = "float32, float16 or bfloat16"
            raise ConfigError(f"policy={self.config.policy!r} needs a model in {allowed}, not {shape.dtype}")
        here = ("auto", "sdpa", *backends("block_attention", shape.device))
        if self.config.attention not in here:
            raise ConfigError(
                f"attention={self.config.attention!r} cannot run on {shape.device.type}; "
                f"allowed here: {', '.join(here)}"
            )
        tokens_per_frame = self.adapter.tokens_per_frame
        self.budget = self.config.budget_tokens(shape.bytes_per_token, tokens_per_frame)
        self.retrieval = Retrieval(self.config, tokens_per_frame)
        self.policy = policy_for(self.config, self.budget, tokens_per_frame)
        self.rope = Rope(hooks.attach(model, self.adapter.language_model, shape.head_dim))
        self.num_frames = 0
        self.read: Read | None = None
        self._turn: Turn | None = None
        self._doing: Literal["read", "answer"] | None = None
        self.clip: Clip | None = None  # being read
        self.prompt: Tensor | None = None  # token ids read before the video
        self.template: Tensor | None = None  # token ids around a question after the video, for policies that ask
        self._observe: Callable[[int, Tensor], None] | None = None  # the queries of such a question
        self.graph_pool = GraphPool()
        self.clips = ClipReader(self)
        self._new_memory()
        self.replay = Replay(self)
        refusal = self.replay.refusal()
        if self.config.graphs == "on" and refusal is not None:
            raise ConfigError(f"graphs='on' is not possible here: {refusal}; allowed: 'auto', 'off'")
        super().__init__(layers=[LiveLayer(self, layer) for layer in range(shape.num_layers)])

    def _new_memory(self) -> None:
        shape = self.adapter.kv_shape()
        room = self.config.clip_frames * self.adapter.tokens_per_frame
        bound = room if self.policy.unbounded else self.budget + room
        self.clips.forget()
        self._num_closed_up = 0
        text = 128 + BUCKETS[-1] + self.config.max_new_tokens  # a prompt, a question and its answer
        self.memory = Memory(shape, self.retrieval.block_size, bound + text)
        history = SlotHistory(self.adapter.tokens_per_frame) if self.policy.wants_history else None
        self.queries = QueryWindow(shape, self.policy.num_queries, history)

    # ---------------------------------------------------------------- called by livevlm.hooks
    @contextmanager
    def reading(self, language_model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
        """Around a forward pass: opens slots for its tokens and decides what they attend to. A failure leaves none."""
        if language_model is not self.adapter.language_model:
            raise StateError("this LiveCache belongs to another model")
        self.require_same_model()
        tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        if tokens.shape[0] != 1:
            raise QuestionError(f"batch size {tokens.shape[0]} is not supported with a LiveCache; allowed: 1")
        is_question = self._doing != "read"
        opened = is_question and self._turn is None
        if opened:
            self.begin_question()
        start = self.memory.end
        try:
            first_position, clip = self.next_position, self.clip
            if clip is None:
                first_position += self.memory.num_new_tokens
            where = self.memory.begin(tokens.shape[1], first_position) if clip is None else clip.where
            self.read = Read(
                self.memory,
                self.rope,
                self.config,
                self.retrieval,
                where,
                first_position,
                turn=self._turn if is_question else None,
                observe=self._observe if clip is None else self.queries.observe,
                place=None if clip is None else clip.place,
            )
            yield
        except BaseException:
            self.memory.end = start
            if opened:
                self.end_question()
            raise
        finally:
            self.read = None

    def write(self, layer: int, key_states: Tensor, value_states: Tensor) -> None:
        """Stores the un-rotated keys and the values of one layer, `[1, num_kv_heads, num_new, head_dim]`."""
        if self.read is None:
            raise StateError("this LiveCache was given to a model it was not made for; call LiveCache(model) first")
        self.memory.k[layer, self.read.where] = key_states[0].detach().transpose(0, 1)
        self.memory.v[layer, self.read.where] = value_states[0].detach().transpose(0, 1)

    # ---------------------------------------------------------------- writing the stream
    @property
    def most_positions(self) -> int:
        """At `positions="spread"`, what is read lies before this."""
        return min(MOST_ANGLES, int(self.adapter.language_model.config.max_position_embeddings))

    @property
    def num_stream_tokens(self) -> int:
        """Tokens of prompt and video that ever went through the model."""
        return self.memory.num_prompt_tokens + self.num_frames * self.adapter.tokens_per_frame

    @property
    def next_position(self) -> int:
        """What is read next stands there in the stream, at `positions="spread"` nearer."""
        return self.num_stream_tokens - self._num_closed_up

    @torch.no_grad()
    def prefill_prompt(self, token_ids: Tensor) -> None:
        """Reads the text before the video, `[num_tokens]`; once, before the first frame.

        Raises:
            StateError: another prompt was read already, or frames were.
        """
        if self.prompt is not None:
            if not torch.equal(self.prompt, token_ids.cpu()):
                raise StateError("the prompt before the video cannot change within a stream; make a new LiveCache")
            return
        if self.num_frames:
            raise StateError("the prompt before the video must be read before the first frame")
        with self._exclusively():
            if token_ids.numel():
                try:
                    remember(self, self.adapter.embed_tokens(token_ids))
                    self.memory.commit_prompt()
                except BaseException:
                    self.memory.rollback()
                    raise
            self.prompt = token_ids.cpu().clone()

    @torch.no_grad()
    def push(self, pixel_values: Tensor, times: Tensor) -> None:
        """Reads frames and keeps the memory within its budget and what may pile up above it, see `Config.slack`.

        Args:
            pixel_values: normalised pixels, `[num_frames, 3, image_size, image_size]`.
            times: seconds since the start of the stream, `[num_frames]`.

        Raises:
            FrameError: wrong shape, or values that are not finite; nothing is read.
            StateError: an answer is being generated.
        """
        size = self.adapter.image_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise FrameError(
                f"pixel_values must have shape [num_frames, 3, {size}, {size}], not {tuple(pixel_values.shape)}"
            )
        if not bool(torch.isfinite(pixel_values).all()):
            raise FrameError("pixel_values holds NaN or infinite values; allowed: finite ones")
        times = torch.as_tensor(times, dtype=torch.float64).cpu()
        if tuple(times.shape) != (pixel_values.shape[0],) or not bool(torch.isfinite(times).all()):
            raise FrameError(f"times must be {pixel_values.shape[0]} finite seconds, one for each frame")
        self.push_unchecked(pixel_values, times)

    @torch.no_grad()
    def push_unchecked(
        self,
        frames: Tensor,
        times: Tensor,
        normalise: Callable[[Tensor], Tensor] | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        """`push` without its look at every value, for which the host would wait.

        Args:
            frames: what `push` takes, or what `normalise` makes that from: pixels as bytes, which cannot be NaN.
            times: float64 on the CPU.
            at_once: compress the memory after each clip, also after small ones: see `Config.slack`.
        """
        clip = self.config.clip_frames
        at_once = at_once or frames.shape[0] >= clip
        with self._exclusively():
            for start in range(0, frames.shape[0], clip):
                part = frames[start : start + clip].to(self.memory.shape.device)
                self._read_clip(part, times[start : start + clip], normalise, at_once)

    def _read_clip(
        self, frames: Tensor, times: Tensor, normalise: Callable[[Tensor], Tensor] | None, at_once: bool
    ) -> None:
        """Reads a clip; compresses the memory before that if it would hold too much, and after it if it does.

        A failure before the clip is read leaves no trace but that of a compression that was complete.
        """
        memory, policy = self.memory, self.policy
        held, num_new = memory.num_video_tokens, frames.shape[0] * self.adapter.tokens_per_frame
        try:
            if held > self.budget and held + num_new > policy.most_tokens:
                self._compress()
                memory.commit_video()
            self.clips.read(frames, times, normalise)
            if at_once or policy.each_clip or policy.num_video_tokens(memory) > policy.most_tokens:
                self._compress()
        except BaseException as error:
            memory.rollback()
            self.queries.rollback()
            if isinstance(error, torch.OutOfMemoryError) and not memory.damaged:
                clip = f"a clip of {frames.shape[0]} frames could not be read; nothing was lost"
                raise torch.OutOfMemoryError(f"{clip}: {error}") from error
            raise
        memory.commit_video()
        self.queries.commit()
        self.num_frames += frames.shape[0]
        if self.retrieval.is_needed(memory):
            with suppress(torch.OutOfMemoryError):  # a question would make them, too, but it should not have to wait
                self.retrieval.summaries(memory)

    def _compress(self) -> None:
        queries, policy = self.queries, self.policy
        if policy.asks and policy.num_video_tokens(self.memory) > self.budget:
            queries = self._asked()
        num_read, moves = self.num_stream_tokens + self.memory.num_new_tokens, self.memory.num_moves
        policy.compress(self.memory, queries, self.rope)
        if self.config.positions == "spread" and self.memory.num_moves != moves:
            self._num_closed_up = spread(self.memory, num_read, self.adapter.tokens_per_frame, self.most_positions)

    def _asked(self) -> QueryWindow:
        """The queries of the text around a question, read behind all that is there, and forgotten."""
        text = self.prompt if self.template is None else self.template
        if text is None:
            text = torch.empty(0, dtype=torch.int64)
        embeds, start = self.adapter.embed_question(text), self.memory.end
        window = QueryWindow(self.memory.shape, embeds.shape[0])
        self._observe = window.observe
        try:
            remember(self, embeds)
            window.expect(self.memory.v[:, start : self.memory.end])
        finally:
            self._observe, self.memory.end = None, start
        return window

    # ---------------------------------------------------------------- questions
    def _require_idle(self) -> None:
        if self.memory.damaged:
            raise StateError("a failure interrupted the memory while tokens were being moved; call reset()")
        if self._doing == "answer":
            raise StateError("an answer is being generated; finish or close it first")
        if self._doing is not None:
            raise StateError("another thread is reading frames into this stream")

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        self._require_idle()
        self._doing = "read"
        try:
            yield
        finally:
            self._doing = None

    def require_same_model(self) -> None:
        """Raises StateError if keys of the model would not fit the memory any more."""
        if self.adapter.kv_shape() != self.memory.shape:
            raise StateError("the model's dtype or device has changed since this LiveCache was made; make a new one")

    def require_askable(self) -> None:
        """Raises StateError if no question can be asked now; see `begin_question`."""
        self._require_idle()
        if not self.num_frames:
            raise StateError("no frame has been pushed yet; push at least one before asking")

    def begin_question(self, *, want_mass: bool = False) -> Turn:
        """From now on the model may read a question and write an answer, until `end_question`.

        Called by itself when the model is called with this cache; `generate` and `Stream.ask` also end the question.

        Raises:
            StateError: no frame has been seen, or another answer is being generated.
        """
        self.require_askable()
        self._doing, self._turn = "answer", Turn(want_mass)
        return self._turn

    def end_question(self) -> None:
        """Forgets question and answer; the memory is bit for bit what it was before."""
        self._doing = self._turn = None
        self.memory.rollback()

    @contextmanager
    def question(self, *, want_mass: bool = False) -> Iterator[Turn]:
        """`begin_question` on entry, `end_question` on exit."""
        turn = self.begin_question(want_mass=want_mass)
        try:
            yield turn
        finally:
            self.end_question()

    def generate(self, stock_generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`model.generate(..., past_key_values=cache)` comes here; see `livevlm.generate.checked_generate`."""
        return checked_generate(self, stock_generate, *args, **kwargs)

    # ---------------------------------------------------------------- the rest of transformers' Cache
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.memory.num_new_tokens

    def reset(self) -> None:
        """Forgets the whole stream."""
        if self._doing is not None:
            self._require_idle()
        self.num_frames = 0
        self.prompt = None
        self.replay.forget()
        self._new_memory()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise StateError("a LiveCache cannot be cropped: a question is forgotten by itself when its answer ends")

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        raise StateError("beam search is not supported with a LiveCache")

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        raise StateError("several sequences at once are not supported with a LiveCache")

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        raise StateError("several sequences at once are not supported with a LiveCache")
