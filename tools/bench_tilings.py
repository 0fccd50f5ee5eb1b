"""Time the ways to cut the CUDA scan's kernels side by side, to choose the ones that the package uses.

    python tools/bench_tilings.py [--compile-only]

``--compile-only`` fills the cache of compiled kernels, in parallel and without timing.
"""

from __future__ import annotations

import argparse
import importlib
from concurrent.futures import ProcessPoolExecutor

import torch
from bench_ops import CASES, Timer, make_inputs

from visionmamba.ops import selective_scan
from visionmamba.ops._plan import forget_plans

scan = importlib.import_module("visionmamba.ops.selective_scan.cuda")
tile = importlib.import_module("visionmamba.ops.selective_scan.cuda_tile")

STAGES = [f"vmamba_t_stage{i}" for i in (1, 2, 3, 4)]
CUTS = [
    tile.Cut(64, 2, 7, 2, 14), tile.Cut(64, 2, 7, 4, 12), tile.Cut(32, 2, 7, 8, 8), tile.Cut(16, 2, 7, 7, 14),
    tile.Cut(16, 2, 7, 12, 12), tile.Cut(16, 2, 7, 15, 15), tile.Cut(8, 2, 7, 7, 14),
]  # fmt: skip
FORWARD = [
    scan.Tiling(8, 2, 8, 1, 4), scan.Tiling(8, 1, 8, 1, 4), scan.Tiling(8, 2, 8, 1, 4, 4), scan.Tiling(4, 2, 8, 1, 4),
    scan.Tiling(16, 1, 8, 1, 3),
]  # fmt: skip
BACKWARD = [
    scan.Tiling(*cut, every_window=every_window)
    for cut in ((8, 1, 4, 2, 4, 3), (8, 1, 4, 2, 4, 2), (4, 2, 4, 2, 4, 3), (4, 2, 4, 2, 4, 2))
    for every_window in (False, True)
]
ROWS = ["vim_t", "plainmamba", "language_2k", "language_64k"]


def jobs() -> list[tuple[str, str, object]]:
    """Return (case, pass, cut or tiling) for every time to take."""
    found = [(case, kind, cut) for case in STAGES for kind in ("forward", "backward") for cut in CUTS]
    found += [(case, "forward", tiling) for case in ROWS for tiling in FORWARD]
    return found + [(case, "backward", tiling) for case in ROWS for tiling in BACKWARD]


def measure(job: tuple[str, str, object], timer: Timer | None) -> float | str:
    """Return the time of one way in milliseconds, or why it has none; without a timer only run it."""
    case, kind, way = job
    if isinstance(way, tile.Cut):
        tile.CUTS[kind] = [way]
    else:
        table = scan._FORWARD_TILINGS if kind == "forward" else scan._BACKWARD_TILINGS
        table[16] = [way]
        scan._GATED_BACKWARD_TILINGS.pop(16, None)
        scan._cut.cache_clear()
    forget_plans()
    try:
        inputs = make_inputs(CASES[case], torch.bfloat16)
        options = (CASES[case].path, list(CASES[case].grid), True, True, False)
        if kind == "forward":
            run = lambda: selective_scan(*inputs, *options)  # noqa: E731
        else:
            batch, tokens, channels = inputs[0].shape[0], inputs[0].shape[1], inputs[0].shape[-1]
            dy = torch.randn(batch, tokens, channels, device="cuda", dtype=torch.bfloat16)
            backward = torch.ops.visionmamba.selective_scan_backward
            run = lambda: backward(dy, None, *inputs, *options)  # noqa: E731
        with torch.no_grad():
            if timer is not None:
                return timer.graph(run)
            run()
            return 0.0
    except Exception as error:
        return str(error).splitlines()[0][:60]
    finally:
        torch.cuda.empty_cache()


def _compile(job: tuple[str, str, object]) -> None:
    measure(job, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--workers", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.compile_only:
        context = torch.multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
            list(pool.map(_compile, jobs()))
        return
    timer = Timer(10)
    for job in jobs():
        time = measure(job, timer)
        text = f"{time:.4f} ms" if isinstance(time, float) else time
        print(f"{job[0]:20s} {job[1]:9s} {text:12s} {job[2]}", flush=True)


if __name__ == "__main__":
    main()
