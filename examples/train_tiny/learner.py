# SPDX-License-Identifier: Apache-2.0
"""One training step: loss, gradients, optimizer. It never waits for the device, so that it can be a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches import Batch
from livevlm.synthetic import ALL_KINDS, COLOURS, SHAPES, TOKENS_PER_FRAME
from packed import encode_frames, packed_forward
from words import ID

LEARNING_RATE = 1e-3
VISION_RATE = 0.3
"""Learning rate of the vision tower, by the others', once it is warm."""
END_WEIGHT = 0.1
"""Weight of the loss on the end of text that follows the answer."""
OBJECT_WEIGHT = 4.0
"""Weight of a cell with an object in the loss on labels, where an empty one has 1."""
SIZES = (len(SHAPES) + 1, len(COLOURS) + 1, TOKENS_PER_FRAME)
"""Classes of the labels of a visual token: shape, colour, cell."""


class Learner:
    """Model, optimizer, and the counts since they were last read.

    Attributes:
        label_weight: weight of the loss on labels, a tensor on the device.
        totals: sums over steps, on the device; see `read`.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model.to(device), device
        hidden = model.config.text_config.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, sum(SIZES))).to(device)
        self.label_weight = torch.zeros((), device=device)
        self.cell = torch.arange(TOKENS_PER_FRAME, device=device)
        names = ("steps", "loss", "label_loss", "grad_norm", "objects", "shape_right", "colour_right")
        self.totals = {name: torch.zeros((), device=device) for name in names}
        self.asked, self.right = (torch.zeros(len(ALL_KINDS), device=device) for _ in range(2))

        groups: dict[str, list[nn.Parameter]] = {"matrices": [], "others": [], "vision": []}
        for name, parameter in model.named_parameters():
            if "vision_tower" in name or "projector" in name:
                groups["vision"].append(parameter)
            elif ".layers." in name and parameter.ndim == 2:
                groups["matrices"].append(parameter)
            else:
                groups["others"].append(parameter)
        self.vision = [*groups["vision"], *self.head.parameters()]
        groups["others"] += self.head.parameters()
        self.parameters = [parameter for group in groups.values() for parameter in group]
        self.rates = [1.0, 1.0, VISION_RATE]
        self.optimizer = self._adamw(
            [{"params": group, "weight_decay": 0.05 * (name == "matrices")} for name, group in groups.items()]
        )

    def _adamw(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        cuda = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=cuda, capturable=cuda)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(LEARNING_RATE, device=self.device)  # read by the graph at each replay
        return optimizer

    def set_rate(self, share: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"].fill_(LEARNING_RATE * share * rate)

    def step(self, batch: Batch) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            answers, ends, features = packed_forward(
                self.model, batch.frames, batch.ids, batch.answer_at, batch.asked, batch.frame_start
            )
        loss = F.cross_entropy(answers.flatten(0, 1), batch.answer.flatten())
        end = F.cross_entropy(ends.flatten(0, 1), torch.full_like(batch.answer, ID["<|im_end|>"]).flatten())
        label_loss = self.label_loss(features, batch.shapes, batch.colours)
        (loss + END_WEIGHT * end + self.label_weight * label_loss).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=self.device.type == "cuda")
        self.optimizer.step()
        with torch.no_grad():
            kind, right = batch.kind.flatten(), (answers.argmax(-1) == batch.answer).flatten().float()
            self.asked.index_add_(0, kind, torch.ones_like(right))
            self.right.index_add_(0, kind, right)
            self._add(steps=1, loss=loss, label_loss=label_loss, grad_norm=norm)

    def label_loss(self, features: Tensor, shapes: Tensor, colours: Tensor) -> Tensor:
        """Cross-entropy of what each visual token shows and where, by a linear head that is thrown away at the end."""
        logits = self.head(features.float()).view(-1, sum(SIZES))
        shape, colour, place = logits.split(SIZES, -1)
        truth = shapes.flatten(), colours.flatten()
        cell = self.cell.expand(shapes.numel() // TOKENS_PER_FRAME, -1).flatten()
        here = truth[0] < len(SHAPES)
        weight = torch.where(here, OBJECT_WEIGHT, 1.0)
        loss = F.cross_entropy(shape, truth[0], reduction="none") + F.cross_entropy(colour, truth[1], reduction="none")
        loss = loss + 0.5 * F.cross_entropy(place, cell, reduction="none")
        with torch.no_grad():
            self._add(
                objects=here.sum(),
                shape_right=(here & (shape.argmax(-1) == truth[0])).sum(),
                colour_right=(here & (colour.argmax(-1) == truth[1])).sum(),
            )
        return (loss * weight).sum() / weight.sum()

    def warm_up(self, frames: Tensor, shapes: Tensor, colours: Tensor, optimizer: torch.optim.AdamW) -> None:
        """A step of the vision tower alone."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features = encode_frames(self.model, frames)
        loss = self.label_loss(features, shapes, colours)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.vision, 1.0)
        optimizer.step()
        self._add(steps=1, label_loss=loss.detach())

    def vision_optimizer(self) -> torch.optim.AdamW:
        return self._adamw([{"params": self.vision, "weight_decay": 0.05}])

    def _add(self, **values: Tensor | int) -> None:
        for name, value in values.items():
            self.totals[name] += value

    def read(self) -> dict[str, Any]:
        """Means since the last time, and starts again. Waits for the device."""
        total = {name: float(value) for name, value in self.totals.items()}
        asked, right = self.asked.tolist(), self.right.tolist()
        for value in (*self.totals.values(), self.asked, self.right):
            value.zero_()
        steps, objects = max(1.0, total["steps"]), max(1.0, total["objects"])
        return {
            **{name: total[name] / steps for name in ("loss", "label_loss", "grad_norm")},
            **{name: total[name] / objects for name in ("shape_right", "colour_right")},
            "right": {kind: r / a for kind, r, a in zip(ALL_KINDS, right, asked, strict=True) if a},
        }
