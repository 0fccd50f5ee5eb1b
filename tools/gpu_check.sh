#!/usr/bin/env bash
# Every GPU test and the operators' benchmark on one GPU, in under ten minutes: tools/gpu_check.sh [output folder]
#
# Kernels are checked first, and nothing else runs if that fails; each part's log is written as it runs. What is timed runs
# alone; the tests, the training curves and the sanitizer share the GPU. At most: 90 + 60 + 100 + 60 + 240 + 20 s.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
mkdir -p "$out"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}.:tools" PYTHONUNBUFFERED=1
export VISIONMAMBA_CACHE_DIR=${VISIONMAMBA_CACHE_DIR:-$(mktemp -d)}
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device: nothing to check" >&2
  exit 2
fi
status=0
run() { # name, seconds, command...
  local name=$1 seconds=$2 begin=$SECONDS code=0
  shift 2
  timeout -k 15 -s INT "$seconds" "$@" >"$out/$name.txt" 2>&1 || { code=$?; status=1; }
  echo "== $name: exit $code after $((SECONDS - begin)) s"
  tail -n "${lines:-3}" "$out/$name.txt"
  return $code
}
# Tests end by an interrupt, after which pytest still says what failed; one that hangs ends by its own limit before.
tests() { # name, seconds, arguments...
  local name=$1 seconds=$2
  shift 2
  run "$name" "$seconds" "$python" -m pytest -q -p no:cacheprovider --no-header -rf --tb=short -p no:benchmark --timeout 90 "$@"
}

lines=30 run kernels 90 "$python" -c '
import sys
from visionmamba.cli._kernel_checks import check_kernels
sys.exit(any(check.problem for check in check_kernels("cuda", print)))' || exit 1

cases=$("$python" -c 'import bench_ops; print(*bench_ops.CASES)')
for case in $cases; do # fill the cache of compiled kernels, in parallel
  timeout 60 "$python" tools/bench_ops.py --cases "$case" --repeats 1 >"$out/.warm.txt" 2>&1 &
done
wait
lines=20 run bench 100 "$python" tools/bench_ops.py --output "$out/ops"
lines=1 tests loader 60 -s tests/gpu/test_loader.py

for model in vim_tiny_patch16_224 vmamba_tiny_s1l8; do
  for precision in fp32 bf16 fp16; do
    timeout 200 "$python" tools/train_curves.py "$model" --precision $precision --output "$out/curves.csv" >"$out/.$model$precision" 2>&1 &
  done
done
(tests large 120 -m "gpu and slow" tests/gpu) >"$out/large_summary.txt" 2>&1 &
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    run "$tool" 150 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 "$python" tools/gpu_sanitize.py >"$out/${tool}_summary.txt" 2>&1 &
  done
fi
files=$(grep -rlE 'mark\.gpu' tests --include='test_*.py' | grep -v tests/gpu/test_loader.py)
tests tests 240 -n 10 --dist worksteal --durations 10 -m "gpu and not slow" $files tests/ops
wait
cat "$out"/*_summary.txt
grep -qE ': exit [1-9]' "$out"/*_summary.txt && status=1
[ "$(wc -l <"$out/curves.csv")" = 6 ] || { echo "== a training run is missing: see $out/.v*" && status=1; }
lines=8 run curves 20 "$python" tools/train_curves.py --compare "$out/curves.csv"
tail -n 3 "$out"/.v* | grep -i error
grep -ahE "^(FAILED|ERROR)" "$out"/{loader,large,tests}.txt | sort -u | head -n 60
exit $status
