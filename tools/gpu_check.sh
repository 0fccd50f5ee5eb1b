#!/usr/bin/env bash
# Every GPU test and the operators' benchmark on one GPU, in under ten minutes: tools/gpu_check.sh [output folder]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
mkdir -p "$out"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}." PYTHONUNBUFFERED=1
workers=$(python3 -c 'import os; print(max(1, min(12, (os.cpu_count() or 2) - 2)))')
python3 -c 'import xdist' 2>/dev/null && parallel=(-n "$workers") || parallel=()
status=0
run() { echo "== $1"; shift; timeout 300 "$@" || status=1; }

run "GPU tests" python3 -m pytest -q -m "gpu and not slow" tests/gpu tests/ops -p no:cacheprovider "${parallel[@]}" \
  >"$out/tests.txt" 2>&1
tail -n 3 "$out/tests.txt"
run "more than 2^31 elements" python3 -m pytest -q -m "gpu and slow" tests/gpu -p no:cacheprovider >"$out/large.txt" 2>&1
tail -n 1 "$out/large.txt"
run "benchmark" python3 tools/bench_ops.py --output "$out/ops" | tee "$out/bench.txt"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 python3 tools/gpu_sanitize.py >"$out/$tool.txt" 2>&1
    tail -n 1 "$out/$tool.txt"
  done
fi
exit $status
