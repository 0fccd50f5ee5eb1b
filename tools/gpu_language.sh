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
        # In parallel: each is limited by launches, not by the GPU
        pids=()
        run() { timeout "${LIMIT:-560}" "$python" tools/train_synthetic.py "$@" --paper --out "$output/synthetic" >"$output/train_$1_$3.log" 2>&1 & pids+=($!); }
        run selective_copying --layer Mamba1 --lr 0.002
        run selective_copying --layer S4D --steps 20000
        run induction_heads --layer Mamba1
        run induction_heads --layer S4D --steps 10000
        timeout "${LIMIT:-560}" "$python" tools/train_synthetic.py mqar --layer Mamba2 --d-state 16 --steps 8000 --paper --out "$output/synthetic" >"$output/train_mqar_16.log" 2>&1 & pids+=($!)
        timeout "${LIMIT:-560}" "$python" tools/train_synthetic.py mqar --layer Mamba2 --d-state 128 --steps 8000 --paper --out "$output/synthetic" >"$output/train_mqar_128.log" 2>&1 & pids+=($!)
        wait "${pids[@]}"
        "$python" tools/train_synthetic.py plot --out "$output/synthetic"
        tail -n 2 "$output"/train_*.log
        ;;
    distributed)
        step tests_nccl 300 "$python" -m pytest -q -p no:cacheprovider tests/language/test_distributed.py
        ;;
    *)
        echo "unknown part: $part" >&2
        exit 2
        ;;
    esac
done
exit $status
