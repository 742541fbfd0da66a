#!/usr/bin/env bash
# Verify, then time everything on a CUDA machine, in under 25 minutes; prints a table last.
#   bash benchmarks/gpu_run.sh [all | verify | ops | step | report] [FILE ...] [pytest arguments]
# Stages, for machines that lend less time at once; FILEs replace a stage's test files. RESULTS
# names the results file, to which rows are added as they are measured (a stage that is stopped
# keeps them); the output of all tests goes beside it, into a .log. VERIFY_LIMIT, OPS_LIMIT and
# STEP_LIMIT are the seconds of a stage, JOBS how many test files are verified at once.
# Every file has a process of its own: a kernel that breaks the CUDA context fails no other file.
# Needs torch, Triton and pytest; whatever else is missing is skipped and said. Without a network,
# the wheels in the folder WHEELS (.whl) are installed aside first: pydantic and what it needs is
# what a bare machine lacks for the step. The package is taken from this checkout.
# Without a GPU: toy shapes, as a rehearsal.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 DS_BUILD_OPS=0

stage=all
case ${1:--} in
    all | verify | ops | step | report) stage=$1; shift ;;
    -*) ;;
    *) echo "error: stage $1 is not one of all, verify, ops, step, report" >&2; exit 1 ;;
esac
files=()
while [ $# -gt 0 ] && [ -e "${1%%::*}" ]; do files+=("$1"); shift; done
extra=("$@")

wheels=${WHEELS:-.whl}
if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    if python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" \
        "$wheels"/*.whl; then export PYTHONPATH="$PYTHONPATH:$site"; fi
fi

has() { python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

name=$(python3 -c 'import torch
found = torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal"
print(found.lower().replace(" ", "-"))') || exit 1
if [ "$name" = rehearsal ]; then default=$(mktemp -d)/rehearsal.jsonl; else
    default=benchmarks/results/$name-$(date +%F).jsonl; fi
results=${RESULTS:-$default}
log=${results%.jsonl}.log
failed=()

# run LOG SECONDS COMMAND...: into the log; what failed, and the last line, on the terminal too.
run() {
    local own=$1 limit=$2 began=$SECONDS code; shift 2
    timeout -s INT -k 15 "$limit" "$@" >"$own" 2>&1  # interrupted, pytest still says what failed
    code=$?
    if [ $code -eq 5 ]; then code=0; fi  # no test was left to run
    if [ $code -ne 0 ]; then
        grep -E '^(E  |FAILED|ERROR)' "$own" | cut -c1-200 | head -n "${SHOWN:-12}"
    fi
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then echo "stopped after $limit s" >>"$own"; fi
    printf '%s: %s s, exit %s: %s\n' "$(basename "$own" .log)" $((SECONDS - began)) $code \
        "$(tail -n 1 "$own" | cut -c1-150)"
    return $code
}
export -f run

# logs FOLDER: the logs of a stage after the one that is there.
logs() { for own in "$1"/*.log; do printf '\n##### %s\n' "$own"; cat "$own"; done >>"$log"; }

verify() {
    local folder file limit=${VERIFY_LIMIT:-420} began=$SECONDS code
    local chosen=("${files[@]}")
    folder=$(mktemp -d)
    if [ ${#chosen[@]} -eq 0 ]; then
        # Those that compile longest first.
        for file in tokens head_reconstruction similarity distillation contrastive max_pooled; do
            chosen+=("tests/kernels/test_${file}_triton.py")
        done
        for file in tests/kernels/test_{large,attention}.py tests/kernels/test_*_triton.py \
            tests/dropin/test_mae.py tests/data/test_fbank.py tests/data/test_augment.py; do
            [[ " ${chosen[*]} " = *" $file "* ]] && continue
            has_needs "$file" && chosen+=("$file")
        done
    fi
    printf '\n=== verify: %s files, %s at once\n' ${#chosen[@]} "${JOBS:=$(jobs_at_once)}"
    # The limit is one for all: nobody starts after it, and who runs is stopped.
    export folder limit
    printf '%s\n' "${chosen[@]}" | xargs -P "$JOBS" -I FILE bash -c '
        left=$((limit - $(date +%s) + '"$(date +%s)"'))
        [ $left -gt 0 ] || { echo "FILE: not started, no time is left"; exit 1; }
        marks=gpu
        case FILE in
            */test_large.py) set -- "$@" -k triton; marks=large ;;
            tests/kernels/*) marks="triton or gpu" ;;
        esac
        run "$folder/$(basename FILE .py).log" $left python3 -m pytest FILE -m "$marks" \
            -q --tb=short -p no:cacheprovider "$@"' verify "${extra[@]}"
    code=$?
    logs "$folder"
    [ $code -eq 0 ] || failed+=("verify (exit $code)")
    printf '=== verify: %s s, exit %s\n' $((SECONDS - began)) $code
}

# has_needs FILE: whether the test's import of hypothesis works; says so where not.
has_needs() {
    grep -qE '^(from|import) hypothesis' "$1" || return 0
    has hypothesis || { echo "skipped: $1, hypothesis is not installed"; return 1; }
}

jobs_at_once() { local cores; cores=$(nproc); echo $((cores < 3 ? 1 : cores / 2 > 8 ? 8 : cores / 2)); }

# time_files TITLE SECONDS FILE...: one after the other, as far as the seconds reach.
time_files() {
    local title=$1 limit=$2 folder deadline left; shift 2
    folder=$(mktemp -d) deadline=$((SECONDS + limit))
    if ! has pytest_benchmark; then echo "skipped: $title, pytest-benchmark is not installed"; return; fi
    printf '\n=== %s\n' "$title"
    for file; do
        left=$((deadline - SECONDS))
        if [ $left -le 0 ]; then failed+=("$file (not started: $limit s are over)"); continue; fi
        run "$folder/$(basename "$file" .py).log" $left python3 -m pytest "$file" -q --tb=short \
            -p no:cacheprovider --benchmark-only --benchmark-disable-gc \
            --benchmark-columns=median --results "$results" "${extra[@]}" ||
            failed+=("$file (exit $?)")
    done
    logs "$folder"
}

# What a step spends its time in comes first. Data loading is not the GPU's.
ops() {
    local order=(tokens losses head_reconstruction masking rows normalization attention mlp ema
        alignment max_pooled similarity) file
    for file in "${order[@]}"; do [ ${#files[@]} -gt 0 ] || set -- "$@" "benchmarks/test_$file.py"; done
    if has pydantic && [ ${#files[@]} -eq 0 ]; then set -- "$@" benchmarks/test_retrieval.py; fi
    time_files ops "${OPS_LIMIT:-540}" "${files[@]}" "$@"
}

step() {
    if ! has pydantic; then echo "skipped: step, pydantic is not installed"; return; fi
    if [ ${#files[@]} -eq 0 ]; then set -- benchmarks/test_step.py; else set -- "${files[@]}"; fi
    time_files step "${STEP_LIMIT:-420}" "$@"
}

report() {
    if [ ! -s "$results" ]; then echo "no rows in $results"; return; fi
    timeout 60 python3 -m kdcmae_fast bench report "$results" || failed+=("report (exit $?)")
}

case $stage in
    all) verify; extra=(); files=(); ops; step; report ;;
    verify) verify ;;
    ops) ops; report ;;
    step) step; report ;;
    report) report ;;
esac
echo "results: $results, output: $log"
if [ ${#failed[@]} -gt 0 ]; then printf 'FAILED: %s\n' "${failed[@]}"; exit 1; fi
