#!/usr/bin/env bash
# Everything of the 1-D line that wants a GPU: tests, times, and the synthetic tasks at the papers' sizes.
#
#   tools/gpu_language.sh OUTPUT [tests|bench|train|distributed ...]      all but distributed by default
#
# Upstream's own tests run too if `python tools/upstream_tests.py fetch` was run before. Training stops early once solved.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:?"usage: tools/gpu_language.sh OUTPUT [tests|bench|train|distributed ...]"}
shift
parts=${*:-tests bench train}
python=${PYTHON:-python}
mkdir -p "$output"
status=0

step() { # name, seconds, command...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" >"$output/$name.log" 2>&1 || { status=1; echo "   failed ($?)"; }
    tail -n 6 "$output/$name.log"
}

for part in $parts; do
    case $part in
    tests)
        step tests_ops 300 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_ssd.py tests/ops/test_state_update.py tests/ops/test_norm.py
        step tests_language 300 "$python" -m pytest -q -p no:cacheprovider tests/language -m gpu
        if [ -d build/upstream ]; then
            step tests_upstream 580 "$python" tools/upstream_tests.py run --into build/upstream
        fi
        ;;
    bench)
        for what in ssd decode length; do
            step "bench_$what" 300 "$python" tools/bench_language.py "$what" --output "$output"
        done
        ;;
    train)
        # In parallel: each is limited by launches, not by the GPU. Checkpoints are kept: run again to go on.
        pids=()
        run() { # name, task and options
            local name=$1
            shift
            timeout "${LIMIT:-560}" "$python" tools/train_synthetic.py "$@" --paper --seconds "${SECONDS_EACH:-480}" --resume \
                --out "$output/synthetic" >"$output/train_$name.log" 2>&1 &
            pids+=($!)
        }
        run selective_mamba selective_copying --layer Mamba1
        run selective_s4d selective_copying --layer S4D
        run induction_mamba induction_heads --layer Mamba1
        run induction_s4d induction_heads --layer S4D
        run mqar_16 mqar --layer Mamba2 --d-state 16
        run mqar_128 mqar --layer Mamba2 --d-state 128
        wait "${pids[@]}"
        "$python" tools/train_synthetic.py plot --out "$output/synthetic"
        tail -n 2 "$output"/train_*.log
        ;;
    distributed)
        step tests_nccl 300 "$python" -m pytest -q -p no:cacheprovider tests/language/test_distributed.py -k over_nccl
        ;;
    *)
        echo "unknown part: $part" >&2
        exit 2
        ;;
    esac
done
exit $status
