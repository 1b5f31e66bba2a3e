# SPDX-License-Identifier: Apache-2.0
"""What a captured forward pass reads and writes: tensors that stay where they are, from question to question."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from livevlm.memory import KVShape

BUCKETS = (16, 32, 64, 128, 256)  # tokens of a question, padded: a graph each
NUM_FACTS = 11


@dataclass(frozen=True)
class Place:
    """Where a pass stands: see `livevlm_kernels/layer_steps.py`."""

    first_slot: int
    num_keys: int  # in the order of the block table, the pass's own included
    first_position: int
    num_tokens: int


@dataclass(frozen=True)
class Choice:
    """How the block table is put together; numbers of blocks."""

    first: int
    candidates: int
    selected: int


class Buffers:
    """All static tensors for one memory of a certain size.

    Attributes:
        embeds: of the question, `[largest bucket, hidden]`; rows behind it hold anything finite.
        token: newest token of the answer, `[1]` int64.
        logits: of what follows the newest pass, `[1, vocab_size]`.
        table: blocks that each layer attends to, `[num_layers, num_blocks]` int32.
        last_q: un-rotated query of the question's last token, `[num_layers, num_qo_heads, head_dim]`.
        place: of the pass that reads the question; step: of the one that reads `token`. int32 `[4]`.
        choice: see `Choice`. int32 `[3]`.
    """

    def __init__(self, shape: KVShape, num_blocks: int, hidden: int, vocab_size: int) -> None:
        device, layers = shape.device, shape.num_layers
        self.embeds = torch.zeros((BUCKETS[-1], hidden), dtype=shape.dtype, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros((1, vocab_size), dtype=shape.dtype, device=device)
        self.blocks = torch.arange(num_blocks, dtype=torch.int32, device=device)
        self.table = self.blocks.repeat(layers, 1)
        self.last_q = torch.zeros((layers, shape.num_qo_heads, shape.head_dim), dtype=shape.dtype, device=device)
        self.rows = torch.arange(BUCKETS[-1], dtype=torch.int32, device=device)
        self.facts = torch.zeros(NUM_FACTS, dtype=torch.int32, device=device)
        self.place, self.step, self.choice = self.facts[:4], self.facts[4:8], self.facts[8:11]
        self._sent = torch.zeros(NUM_FACTS, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def send(self, place: Place, step: Place, choice: Choice) -> None:
        """Tells the device where the next question stands, in one copy that nothing waits for."""
        if self._copied is not None:
            self._copied.synchronize()  # an interrupted question's copy may not have happened yet
        numbers = (*vars(place).values(), *vars(step).values(), *vars(choice).values())
        self._sent.copy_(torch.tensor(numbers, dtype=torch.int32))
        self.facts.copy_(self._sent, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.facts.device))

    def read_everything(self) -> None:
        """Every layer attends to all blocks."""
        self.table.copy_(self.blocks.expand_as(self.table))
