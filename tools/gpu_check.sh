#!/usr/bin/env bash
# Every GPU test and the operators' benchmark on one GPU, in under ten minutes: tools/gpu_check.sh [output folder]
#
# Kernels are checked first, and nothing else runs if that fails; each part's log is written as it runs, and a part that
# fails or takes too long keeps none of the others from running. What is timed runs alone; the tests, the training curves
# and the sanitizer share the GPU. At most: 90 + 60 + 90 + 60 + 250 + 20 s. What was shown is said at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
mkdir -p "$out"
rm -f "$out"/*.txt "$out"/.v* "$out"/curves.csv
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
  echo "== $name: exit $code after $((SECONDS - begin)) s, at $SECONDS s"
  tail -n "${lines:-2}" "$out/$name.txt" | cut -c1-240
  return $code
}
# Each test's outcome is written as it ends, so that a run that is cut says what it saw.
tests() { # name, seconds, arguments...
  local name=$1 seconds=$2
  shift 2
  run "$name" "$seconds" "$python" -m pytest -v -p no:cacheprovider --no-header -rf --tb=short -p no:benchmark --timeout 90 "$@"
}
# Parts that run beside the tests: their summaries are shown once all have ended.
beside() { # name, command...
  local name=$1
  shift
  "$@" >"$out/.v.$name" 2>&1 || echo failed >>"$out/.v.failed"
}

lines=40 run kernels 90 "$python" -c '
import sys
from visionmamba.cli._kernel_checks import check_kernels
sys.exit(any(check.problem for check in check_kernels("cuda", print)))' || exit 1

cases=$("$python" -c 'import bench_ops; print(*bench_ops.CASES)')
for case in $cases; do # fill the cache of compiled kernels, in parallel
  timeout 60 "$python" tools/bench_ops.py --cases "$case" --repeats 1 >"$out/.v.warm" 2>&1 &
done
wait
lines=22 run bench 90 "$python" tools/bench_ops.py --output "$out/ops"
tests loader 60 -rfP tests/gpu/test_loader.py # -P: with the times it prints

for model in vim_tiny_patch16_224 vmamba_tiny_s1l8; do
  for precision in fp32 bf16 fp16; do
    beside "$model.$precision" timeout 230 "$python" tools/train_curves.py "$model" --precision $precision --output "$out/curves.csv" &
  done
done
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    beside $tool run $tool 230 compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 "$python" tools/gpu_sanitize.py &
  done
fi
beside large tests large 150 -m "gpu and slow" tests/gpu &
beside training tests training 240 -n 3 --dist worksteal -m "gpu and not slow" $(grep -rlE 'mark\.gpu' tests/training tests/cli tests/openmmlab --include='test_*.py') &
files="tests/gpu tests/ops tests/models/test_gpu_goldens.py $(grep -rlE 'mark\.gpu' tests/language --include='test_*.py') tests/test_cuda_graph.py tests/layers"
tests tests 240 -n 10 --dist worksteal --durations 15 -m "gpu and not slow" --deselect tests/gpu/test_loader.py $files
wait
cat "$out"/.v.{memcheck,racecheck,large,training} 2>/dev/null
[ -e "$out/.v.failed" ] && status=1
[ "$(wc -l <"$out/curves.csv")" = 6 ] || { echo "== a training run is missing: $(tail -qn 1 "$out"/.v.v*)"; status=1; }
lines=8 run curves 20 "$python" tools/train_curves.py --compare "$out/curves.csv"
echo "== shown"
"$python" tools/gpu_summary.py "$out" | tee "$out/summary.txt"
[ "${PIPESTATUS[0]}" = 0 ] || status=1
echo "== gpu_check: exit $status after $SECONDS s"
exit $status
