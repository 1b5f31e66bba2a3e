# SPDX-License-Identifier: Apache-2.0
"""What a captured forward pass reads and writes: tensors that stay where they are, from question to question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from livevlm.memory import KVShape

BUCKETS = (16, 32, 64, 128, 256)  # tokens of a question, padded: a graph each
NUM_FACTS = 13


@dataclass(frozen=True)
class Place:
    """Where a pass stands: see `livevlm_kernels/layer_steps.py`."""

    first_slot: int
    num_keys: int  # in the order of the block table, the pass's own included
    first_position: int
    num_tokens: int


@dataclass(frozen=True)
class Choice:
    """How the block table is put together; numbers of blocks, but for the last one.

    Attributes:
        searched: entries that are looked at to find blocks: see `Retrieval.searched`.
    """

    first: int
    candidates: int
    selected: int
    searched: int


class Buffers:
    """All static tensors for one memory of a certain size.

    Attributes:
        ids: of the question's tokens, `[largest bucket]` int32; behind them are those of earlier ones.
        token: newest token of the answer, `[1]` int64.
        logits: of what follows the newest pass, `[1, vocab_size]`.
        table: blocks that each layer attends to, `[num_layers, num_blocks]` int32.
        last_q: un-rotated query of the question's last token, `[num_layers, num_qo_heads, head_dim]`.
        place: of the pass that reads the question; step: of the one that reads `token`. int32 `[4]`.
        choice: see `Choice`. int32 `[4]`.
        after_video: whether the first of `ids` stands for the newline that ends a video. int32 `[1]`.
    """

    def __init__(self, shape: KVShape, num_blocks: int, vocab_size: int) -> None:
        device, layers = shape.device, shape.num_layers
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros((1, vocab_size), dtype=shape.dtype, device=device)
        self.blocks = torch.arange(num_blocks, dtype=torch.int32, device=device)
        self.table = self.blocks.repeat(layers, 1)
        self.last_q = torch.zeros((layers, shape.num_qo_heads, shape.head_dim), dtype=shape.dtype, device=device)
        self.rows = torch.arange(BUCKETS[-1], dtype=torch.int32, device=device)
        self._facts = torch.zeros(NUM_FACTS + BUCKETS[-1], dtype=torch.int32, device=device)
        self.place, self.step, self.choice, self.after_video, self.ids = self._facts.split([4, 4, 4, 1, BUCKETS[-1]])
        self._pinned = torch.zeros(self._facts.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._sent = self._pinned.numpy()  # the same memory
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, token_ids: Tensor, after_video: bool, place: Place, step: Place, choice: Choice) -> None:
        """Tells the device what the next question is and where it stands, in one copy that nothing waits for."""
        if self._copied is not None:
            self._copied.synchronize()  # an interrupted question's copy may not have happened yet
        sent, first = self._sent, NUM_FACTS + after_video
        sent[:NUM_FACTS] = (*vars(place).values(), *vars(step).values(), *vars(choice).values(), after_video)
        sent[first : first + token_ids.shape[0]] = token_ids.numpy()
        self._facts.copy_(self._pinned, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._facts.device))

    def read_everything(self) -> None:
        """Every layer attends to all blocks."""
        self.table.copy_(self.blocks.expand_as(self.table))
