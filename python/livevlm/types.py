# SPDX-License-Identifier: Apache-2.0
"""Names that settings may take. One place, so that checks, documentation and the command line cannot drift apart."""

from typing import Literal

PolicyName = Literal[
    "vision_sink", "clip_merge", "similarity", "novelty", "proxy_query", "recent", "uniform", "random", "full"
]
RetrievalName = Literal["mean_key", "mass", "frame", "none"]
Scope = Literal["layer", "shared"]
Pooling = Literal["query", "softmax"]
Positions = Literal["spread", "original", "packed"]
Attention = Literal["auto", "sdpa", "cuda", "triton", "cpu", "reference"]
Graphs = Literal["auto", "on", "off"]
RetrievalPass = Literal["inline", "two_pass"]
RetrievalQueries = Literal["all", "last"]
Drop = Literal["never", "oldest", "newest"]
