#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that needs a GPU, for one run on a machine that has one: bench/run_gpu.sh RESULTS_FOLDER
#
# Needs python3 with torch >= 2.11 for CUDA, triton and pytest; installs nothing. A library that was built elsewhere and
# lies at livevlm_kernels/_C.abi3.so is used as it is; otherwise it is built here, for this GPU.
# A section that fails doesn't stop the next one; the script ends with a list and a non-zero status.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${1:?usage: bench/run_gpu.sh RESULTS_FOLDER}")
mkdir -p "$results"
export PYTHONPATH=$PWD:$PWD/python:$PWD/bench${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# Tests to repeat under each sanitizer tool: compiled CUDA kernels, on small and odd shapes.
SANITIZE=${SANITIZE:-"cuda-cuda and (odd or ones or ragged or first_token or writes_every or padded or misaligned)"}

failed=()
section() { # section NAME COMMAND...: runs it, logs it, remembers a failure
  local name=$1 start=$SECONDS
  shift
  printf '\n== %4ds  %s\n' "$SECONDS" "$name"
  "$@" 2>&1 | tee "$results/${name// /_}.log" || failed+=("$name")
  printf '== %s took %ds\n' "$name" $((SECONDS - start))
}

build() {
  local capability
  capability=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  [ "$capability" = 90 ] && capability=90a
  LIVEVLM_CUDA=ON LIVEVLM_CUDA_ARCHS=$capability-real python3 setup.py -q build_ext --inplace
}

# Only tests of kernels: those of the layers above need packages that may not be here.
kernel_tests() {
  python3 -c '
from pathlib import Path
from livevlm_kernels import _registry
stems = [*_registry.ops(), "ops_contract", "build", "triton_compile"]
print(*(path for stem in stems if (path := Path(f"tests/test_{stem}.py")).exists()))'
}

tests() { python3 -m pytest -q -p no:cacheprovider --durations=10 $(kernel_tests); }

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
sanitize() {
  [ -n "$sanitizer" ] || { echo "no compute-sanitizer"; return 1; }
  # Without the caching allocator each tensor has bounds of its own.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 "$sanitizer" --tool "$1" --error-exitcode 99 --launch-timeout 0 \
    python3 -m pytest -q -x -p no:cacheprovider -m cuda -k "$SANITIZE" $(kernel_tests)
}

[ -f livevlm_kernels/_C.abi3.so ] || section "build" build
section "environment" python3 -m livevlm_kernels.env
section "tests" tests
for tool in memcheck racecheck initcheck synccheck; do section "$tool" sanitize "$tool"; done
for script in bench/bench_*.py; do
  name=$(basename "$script" .py)
  section "$name" timeout 300 python3 "$script" --results "$results" # rows are saved as soon as a shape is done
done

printf '\n== %4ds  ' "$SECONDS"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
echo "all sections passed"
