# SPDX-License-Identifier: Apache-2.0
"""The benchmarks by name."""

from __future__ import annotations

from livevlm.benchmarks.mlvu import MLVU
from livevlm.benchmarks.offline import CGBENCH, EGOSCHEMA, LONGVIDEOBENCH, VIDEOMME
from livevlm.benchmarks.ovobench import OVOBENCH
from livevlm.benchmarks.rvs import RVS
from livevlm.benchmarks.streamingbench import STREAMINGBENCH

FORMATS = {
    each.name: each for each in (STREAMINGBENCH, OVOBENCH, RVS, MLVU, VIDEOMME, EGOSCHEMA, LONGVIDEOBENCH, CGBENCH)
}
