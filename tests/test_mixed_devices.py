# SPDX-License-Identifier: Apache-2.0
"""Arguments on different devices: one typed error that names both, and nothing is written."""

from __future__ import annotations

import pytest
import torch

import livevlm_kernels
from livevlm_kernels import ArgumentError

SLOTS = (torch.arange(12) % 3).int().repeat(2, 1)
LENS = torch.tensor([12, 7], dtype=torch.int32)


def tokens(*shape):
    return torch.randn(*(shape or (2, 12, 2, 8)))


# op, arguments, those that lie on the other device, what the error says: the argument and its device come first
CASES = {
    "compact_indices": ("compact_tokens", {"tensors": [tokens()], "indices": SLOTS[:, :3]}, ["indices"],
                        r"tensors\[0\] is on {own} but indices is on {other}"),
    "compact_tensors": ("compact_tokens", {"tensors": [tokens(), tokens()], "indices": SLOTS[:, :3]}, ["tensors[1]"],
                        r"tensors\[1\] is on {other} but indices is on {own}"),
    "evict_slots": ("evict_similar", {"k": tokens(), "v": tokens(), "slots": SLOTS, "budget": 9,
                                      "num_recent_frames": 2, "tokens_per_frame": 3}, ["slots"],
                    "slots is on {other} but k is on {own}"),
    "evict_values": ("evict_similar", {"k": tokens(), "v": tokens(), "slots": SLOTS, "budget": 9,
                                       "num_recent_frames": 2, "tokens_per_frame": 3}, ["v"],
                     "v is on {other} but k is on {own}"),
    "merge_indices": ("merge_tokens", {"k": tokens(), "v": tokens(), "indices": SLOTS[:, :3]}, ["indices"],
                      "indices is on {other} but k is on {own}"),
    "merge_groups": ("merge_tokens", {"k": tokens(), "v": tokens(), "groups": SLOTS, "num_groups": 3}, ["groups"],
                     "groups is on {other} but k is on {own}"),
    "merge_weights": ("merge_tokens", {"k": tokens(), "v": tokens(), "groups": SLOTS, "num_groups": 3,
                                       "weights": torch.rand(2, 12)}, ["weights"],
                      "weights is on {other} but k is on {own}"),
    "score_queries": ("score_tokens", {"q": tokens(2, 3, 4, 8), "k": tokens()}, ["q"],
                      "q is on {other} but k is on {own}"),
    "score_lens": ("score_tokens", {"q": tokens(2, 3, 4, 8), "k": tokens(), "seq_lens": LENS}, ["seq_lens"],
                   "seq_lens is on {other} but k is on {own}"),
    "score_positions": ("score_tokens", {"q": tokens(2, 3, 4, 8), "k": tokens(), "positions": SLOTS,
                                         "cos_sin_cache": torch.rand(9, 8)}, ["positions"],
                        "positions is on {other} but k is on {own}"),
    "score_cache": ("score_tokens", {"q": tokens(2, 3, 4, 8), "k": tokens(), "positions": SLOTS,
                                     "cos_sin_cache": torch.rand(9, 8)}, ["cos_sin_cache"],
                    "cos_sin_cache is on {other} but k is on {own}"),
    "redundancy_slots": ("score_redundancy", {"k": tokens(), "v": tokens(), "recent_k": tokens(2, 2, 3, 2, 8),
                                              "slots": SLOTS}, ["slots"], "slots is on {other} but k is on {own}"),
    "redundancy_recent": ("score_redundancy", {"k": tokens(), "v": tokens(), "recent_k": tokens(2, 2, 3, 2, 8),
                                               "slots": SLOTS}, ["recent_k"],
                          "recent_k is on {other} but k is on {own}"),
    "novelty_usual": ("score_novelty", {"x": tokens(), "usual": tokens(2, 3, 2, 8), "slots": SLOTS,
                                        "previous": SLOTS}, ["usual"], "usual is on {other} but x is on {own}"),
    "novelty_previous": ("score_novelty", {"x": tokens(), "usual": tokens(2, 3, 2, 8), "slots": SLOTS,
                                           "previous": SLOTS}, ["previous"],
                         "previous is on {other} but x is on {own}"),
    "select_lens": ("select_tokens", {"scores": tokens(2, 12), "budget": 3, "seq_lens": LENS}, ["seq_lens"],
                    "seq_lens is on {other} but scores is on {own}"),
    "quantize_values": ("quantize_blocks", {"k": tokens(3, 4, 2, 8), "v": tokens(3, 4, 2, 8), "dtype": "fp8"}, ["v"],
                        "v is on {other} but k is on {own}"),
    "summarize_lens": ("summarize_blocks", {"k": tokens(), "block_size": 4, "seq_lens": LENS}, ["seq_lens"],
                       "seq_lens is on {other} but k is on {own}"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("cpu", "meta"),
        pytest.param("cuda", "cpu", marks=pytest.mark.cuda),
        pytest.param("cpu", "cuda", marks=pytest.mark.cuda),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_names_both_devices_and_writes_nothing(case, own, other):
    op, arguments, elsewhere, message = CASES[case]

    def place(name, value):
        if isinstance(value, list):
            return [place(f"{name}[{number}]", x) for number, x in enumerate(value)]
        # A copy also on the same device: the table must stay as it is.
        return value.clone().to(other if name in elsewhere else own) if isinstance(value, torch.Tensor) else value

    placed = {name: place(name, value) for name, value in arguments.items()}
    names = {"own": f"{own}(:0)?", "other": f"{other}(:0)?"}
    with pytest.raises(ArgumentError, match=message.format(**names)):
        getattr(livevlm_kernels, op)(**placed)
    for name, value in placed.items():
        pairs = zip(value, arguments[name], strict=True) if isinstance(value, list) else [(value, arguments[name])]
        for x, y in pairs:
            if isinstance(x, torch.Tensor) and not x.is_meta:
                assert torch.equal(x.cpu(), y)
