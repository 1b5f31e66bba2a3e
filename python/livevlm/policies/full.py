# SPDX-License-Identifier: Apache-2.0
"""Keeps every token: the memory grows with the stream. The upper bound that other policies are compared with."""

from livevlm.memory import Memory
from livevlm.policies.base import Policy, QueryWindow
from livevlm.rope import Rope


class Full(Policy):
    unbounded = True

    def compress(self, memory: Memory, queries: QueryWindow, rope: Rope) -> None:
        """Nothing is evicted."""
