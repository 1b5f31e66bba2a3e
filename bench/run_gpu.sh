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
# PARTS: which of "tests sanitizers benchmarks" to run. JOBS: test processes at a time; benchmarks run alone.
PARTS=${PARTS:-tests sanitizers benchmarks} JOBS=${JOBS:-12}
# Tests to repeat under each sanitizer tool: compiled CUDA kernels; not what is large, or about Python.
SANITIZE=${SANITIZE:-"cuda-cuda and not (7B or paper or sweep or refuses or opcheck or compiled or layers or past_int32)"}

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

ops() { python3 -c 'from livevlm_kernels import _registry; print(*_registry.ops(), sep="\n")'; }

# Only tests of kernels: those of the layers above need packages that may not be here. One process a line.
kernel_tests() {
  ops | sed 's|^|tests/test_ops_contract.py -k |' # the slowest by far
  grep -lE '^import kit$|^from livevlm_kernels|^import livevlm_kernels' tests/test_*.py | grep -vE 'bench|ops_contract'
}
one_test() { python3 -m pytest -q -p no:cacheprovider $1; } # one_test "FILE OPTIONS"

# in_parallel COMMAND...: runs it with each line of the input as a further argument; prints logs of failures at length.
in_parallel() {
  local logs
  logs=$(mktemp -d)
  export -f quietly
  xargs -P "$JOBS" -I{} bash -c 'quietly "$@"' _ "$logs" {} "$@" {}
  local status=$?
  rm -rf "$logs"
  return $status
}
quietly() { # quietly FOLDER NAME COMMAND...: prints the last line, or more if it fails
  local log=$1/${2//[\/ ]/_} name=$2
  shift 2
  if "$@" >"$log" 2>&1; then
    printf '%-44s %s\n' "$name" "$(grep -E 'passed|deselected|SUMMARY' "$log" | tail -2 | tr '\n' ' ')"
  else
    local status=$?
    [ $status -eq 5 ] && return 0 # no test selected
    printf '%-44s FAILED with %s\n' "$name" $status
    tail -40 "$log"
    return 1
  fi
}

tests() { kernel_tests | in_parallel one_test; }

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
one_sanitizer() { # one_sanitizer "TOOL FILE"
  set -- $1
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 240 "$sanitizer" --tool "$1" --error-exitcode 99 --launch-timeout 0 \
    python3 -m pytest -q -x -p no:cacheprovider -m cuda -k "$SANITIZE" "$2"
}
export -f one_test one_sanitizer
export sanitizer SANITIZE
sanitizers() {
  [ -n "$sanitizer" ] || { echo "no compute-sanitizer"; return 1; }
  # Without the caching allocator each tensor has bounds of its own.
  local op tool
  for tool in racecheck memcheck initcheck synccheck; do
    for op in $(ops); do
      if ls csrc/*/"$op".cu >/dev/null 2>&1; then echo "$tool tests/test_$op.py"; fi
    done
  done | in_parallel one_sanitizer
}

[ -f livevlm_kernels/_C.abi3.so ] || section "build" build
section "environment" python3 -m livevlm_kernels.env
for part in $PARTS; do
  case $part in
    tests | sanitizers) section "$part" "$part" ;;
    benchmarks)
      for script in bench/bench_*.py; do # rows are saved as soon as a shape is done
        section "$(basename "$script" .py)" timeout 300 python3 "$script" --results "$results"
      done
      ;;
    streams)
      for shape in 7b 0.5b; do
        section "stream $shape" timeout 1800 python3 -c 'from livevlm.cli import main; main()' bench stream \
          --shape "$shape" --out "$results/stream"
      done
      ;;
    *) failed+=("unknown part $part") ;;
  esac
done

printf '\n== %4ds  ' "$SECONDS"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED: %s\n' "$(IFS=,; echo "${failed[*]}")"
  exit 1
fi
echo "all sections passed"
