"""Say what a run of ``tools/gpu_check.sh`` has shown, line by line: tests by what they show, times beside their limits.

python tools/gpu_summary.py gpu_check
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter
from pathlib import Path

_OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
_IN_PARALLEL = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (tests/.*?) *$", re.MULTILINE)
_ALONE = re.compile(r"^(tests/\S.*?) (PASSED|FAILED|ERROR|SKIPPED)(?: \(.*\))? *\[ *\d+%\]$", re.MULTILINE)

SHOWN = {
    "op goldens": r"tests/ops/.*oldens.*\[cuda-",
    "model goldens": r"tests/models/test_gpu_goldens",
    "operators against float64, CUDA": r"tests/ops/.*\[cuda-cuda-",
    "operators against float64, Triton": r"tests/ops/.*\[cuda-triton-",
    "200 random shapes (40 mixes of options, 5 shapes each)": r"random_shapes_agree_with_float64",
    "results over NaN-poisoned memory": r"every_output_is_written",
    "non-contiguous inputs": r"test_selective_scan.*\[cuda-cuda-(padded|transposed|shared_projections|.*views)",
    "channels-first inputs": r"channels_first",
    "extreme step sizes": r"extreme",
    "two runs bit-equal": r"bit_equal",
    "more than 2^31 elements": r"two_billion",
    "CUDA graphs, streams, torch.compile": r"tests/gpu/.*(cuda_graph|current_stream|compile_takes)|test_cuda_graph",
    "bad arguments named before a launch": r"bad_arguments",
    "cache shared, read-only, read by the next process": r"test_loader",
    "training on the GPU": r"tests/training/",
    "language blocks on the GPU": r"tests/language/",
}
"""What to show, and the tests that show it."""

LIMITS = {
    "vim_t": (0.16, 0.60),
    "vim_s": (0.32, 1.2),
    "vmamba_t_stage1": (0.40, 0.85),
    "vmamba_t_stage4": (0.06, 0.15),
    "plainmamba": (0.30, 1.1),
    "vanilla_vmamba_stage1": (1.7, 5.0),
    "language_2k": (0.35, 1.2),
    "language_64k": (1.7, 5.8),
}
"""Forward and backward of the operators' benchmark in milliseconds on one H200, at most."""


def outcomes(folder: Path) -> dict[str, str]:
    """Return every test's outcome, as far as the logs got."""
    found = {}
    for log in sorted(folder.glob("*.txt")):
        text = log.read_text(errors="replace")
        found |= {name: outcome for outcome, name in _IN_PARALLEL.findall(text)}
        found |= dict(_ALONE.findall(text))
    return found


def counted(tests: dict[str, str]) -> str:
    count = Counter(tests.values())
    return ", ".join(f"{count[outcome]} {outcome.lower()}" for outcome in _OUTCOMES if count[outcome]) or "NOT RUN"


def line(folder: Path, log: str, pattern: str) -> str:
    """Return what a pattern finds in a log, or that it does not."""
    path = folder / f"{log}.txt"
    found = re.findall(pattern, path.read_text(errors="replace")) if path.exists() else []
    return found[-1] if found else f"NOT SEEN in {path.name}"


def times(folder: Path) -> list[str]:
    """Return the benchmark's rows beside their limits."""
    path = folder / "ops.csv"
    rows = {row["case"]: row for row in csv.DictReader(path.open())} if path.exists() else {}
    text = []
    for case, limits in LIMITS.items():
        if case not in rows:
            text.append(f"  {case:24s} NOT RUN")
            continue
        found = [float(rows[case][kind]) for kind in ("forward", "backward")]
        pairs = zip(("forward", "backward"), found, limits, strict=True)
        cells = [
            f"{kind} {time:.3f} of {limit:.2f} ms {'' if time <= limit else 'OVER'}" for kind, time, limit in pairs
        ]
        text.append(f"  {case:24s} " + "   ".join(f"{cell:32s}" for cell in cells).rstrip())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    tests = outcomes(folder)
    print(f"tests: {counted(tests)}")
    for what, pattern in SHOWN.items():
        print(f"  {what:56s} {counted({name: x for name, x in tests.items() if re.search(pattern, name)})}")
    print(f"first call, and from the cache in a new process: {line(folder, 'loader', r'first call .*s')}")
    for tool, verdict in (("memcheck", r"ERROR SUMMARY: .*"), ("racecheck", r"RACECHECK SUMMARY: .*")):
        print(f"{tool}: {line(folder, tool, verdict)}; {line(folder, tool, 'ran every kernel')}")
    print("medians, bf16:", *times(folder), sep="\n")
    print("300 training steps:")
    curves = folder / "curves.txt"
    print("  " + "\n  ".join((curves.read_text().strip() if curves.exists() else "NOT RUN").splitlines()))
    failed = sorted(name for name, outcome in tests.items() if outcome in ("FAILED", "ERROR"))
    print(*(f"FAILED {name}" for name in failed), sep="\n")
    sys.exit(bool(failed) or not tests)


if __name__ == "__main__":
    main()
