#!/usr/bin/env bash
# Verify, then time everything on a CUDA machine, in under 25 minutes; prints a table last.
#   bash benchmarks/gpu_run.sh [all | verify | time | report] [pytest arguments]
# Stages, for machines that lend less time at once; RESULTS names the results file, VERIFY_LIMIT and
# TIME_LIMIT the seconds of the first two (rows are written as they are measured, so a stage that
# is stopped keeps them). Needs torch, Triton and pytest; whatever else is missing is skipped and
# said. The package is taken from this checkout. Without a GPU: toy shapes, as a rehearsal.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 DS_BUILD_OPS=0
stage=${1:-all}
[ $# -gt 0 ] && shift

has() { python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

name=$(python3 -c 'import torch
found = torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal"
print(found.lower().replace(" ", "-"))') || exit 1
if [ "$name" = rehearsal ]; then default=$(mktemp -d)/rehearsal.jsonl; else
    default=benchmarks/results/$name-$(date +%F).jsonl; fi
results=${RESULTS:-$default}
failed=()

run() {  # run NAME SECONDS COMMAND...: go on after a failure, tell it at the end
    local title=$1 limit=$2 began=$SECONDS; shift 2
    printf '\n=== %s\n' "$title"
    timeout "$limit" "$@"
    local code=$?
    [ $code -eq 124 ] && printf 'stopped after %s s\n' "$limit"
    [ $code -eq 0 ] || failed+=("$title (exit $code)")
    printf '=== %s: %s s, exit %s\n' "$title" $((SECONDS - began)) $code
}

verify() {
    local tests=(tests/kernels) ignored=(--ignore tests/kernels/test_compile_gate.py)
    if has pydantic; then tests+=(tests/models tests/dropin)
    else tests+=(tests/dropin); echo "skipped: tests/models, pydantic is not installed"; fi
    has hypothesis || { echo "skipped: tests that need hypothesis, which is not installed"
        while read -r file; do ignored+=(--ignore "$file"); done \
            < <(grep -rlE '^(from|import) hypothesis' tests); }
    run verify "${VERIFY_LIMIT:-570}" python3 -m pytest "${tests[@]}" "${ignored[@]}" -q "$@"
}

time_all() {
    if ! has pytest_benchmark; then echo "skipped: timing, pytest-benchmark is not installed"; return; fi
    run time "${TIME_LIMIT:-840}" python3 -m pytest benchmarks -q --benchmark-only \
        --benchmark-disable-gc --benchmark-columns=median --results "$results" "$@"
}

report() {
    if [ ! -s "$results" ]; then echo "no rows in $results"; return; fi
    run report 60 python3 -m kdcmae_fast bench report "$results"
}

case $stage in
    all) verify; time_all "$@"; report ;;
    verify) verify "$@" ;;
    time) time_all "$@"; report ;;
    report) report ;;
    *) echo "error: stage $stage is not one of all, verify, time, report" >&2; exit 1 ;;
esac
echo "results: $results"
if [ ${#failed[@]} -gt 0 ]; then printf 'FAILED: %s\n' "${failed[@]}"; exit 1; fi
