# SPDX-License-Identifier: Apache-2.0
"""Memory policies: how a stream's memory is kept within its budget. One file each, composed from `livevlm_kernels`."""

from __future__ import annotations

from livevlm.config import Config
from livevlm.policies.base import Policy, QueryWindow
from livevlm.policies.clip_merge import ClipMerge
from livevlm.policies.full import Full
from livevlm.policies.novelty import Novelty
from livevlm.policies.proxy_query import ProxyQuery
from livevlm.policies.random import Random
from livevlm.policies.recent import Recent
from livevlm.policies.similarity import Similarity
from livevlm.policies.uniform import Uniform
from livevlm.policies.vision_sink import VisionSink

POLICIES: dict[str, type[Policy]] = {
    "vision_sink": VisionSink,
    "clip_merge": ClipMerge,
    "similarity": Similarity,
    "novelty": Novelty,
    "proxy_query": ProxyQuery,
    "recent": Recent,
    "uniform": Uniform,
    "random": Random,
    "full": Full,
}


def policy_for(config: Config, budget: int, tokens_per_frame: int) -> Policy:
    """The policy that `config.policy` names."""
    return POLICIES[config.policy](config, budget, tokens_per_frame)


__all__ = ["POLICIES", "Policy", "QueryWindow", "policy_for"]
