"""Time the zoo on this machine's CPU beside timm models, in one run.

python tools/bench_cpu.py [--threads 2] [--repeats 9] [--json FILE]

Forward and forward + backward at batch 1, ours and the peer in turn so that both meet the same machine, with the native
and with the plain PyTorch kernels; and the memory that one training step at batch 8 adds, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch

import visionmamba

PAIRS = (
    ("vim_tiny_patch16_224", "deit_tiny_patch16_224"),
    ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224"),
)


def measure(models: dict[str, torch.nn.Module], x: torch.Tensor, repeats: int, training: bool) -> dict[str, float]:
    """Return the median seconds of each model's step, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 2):
        for name, model in models.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(training):
                out = model(x)
                if training:
                    out.sum().backward()
            if repeat >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory() -> float:
    """Return the MiB that this process held at its peak."""
    status = Path("/proc/self/status")  # not getrusage: Linux lets a child begin with its parent's peak there
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def training_memory(name: str, batch: int) -> float:
    """Return the MiB that a training step adds to a process that holds the model; run it in a fresh process."""
    model = timm.create_model(name)
    x = torch.randn(batch, 3, 224, 224)
    with torch.no_grad():
        model(x[:1])  # compiled kernels and buffers are not the step's
    before = peak_memory()
    model(x).sum().backward()
    return peak_memory() - before


def in_own_process(name: str, batch: int) -> float:
    """Run :func:`training_memory` in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", name, "--batch", str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def row(ours: str, peer: str, what: str, backend: str, figures: dict[str, float]) -> dict[str, str | float]:
    """Return a row of the table from the milliseconds or MiB of both models."""
    figures = dict(ours=figures[ours], theirs=figures[peer], ratio=figures[ours] / figures[peer])
    return dict(model=ours, peer=peer, what=what, backend=backend, **figures)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8, help="batch of the training step whose memory is taken")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(training_memory(args.memory_of, args.batch))
        return
    rows = []
    x = torch.randn(1, 3, 224, 224)
    for ours, peer in PAIRS:
        models = {name: timm.create_model(name).eval() for name in (ours, peer)}
        for backend, training in (("cpu", False), ("cpu", True), ("torch", False)):
            with visionmamba.backend(backend):
                seconds = measure(models, x, args.repeats, training)
            what = "forward + backward" if training else "forward"
            rows.append(row(ours, peer, what, backend, {name: 1e3 * value for name, value in seconds.items()}))
        memory = {name: in_own_process(name, args.batch) for name in (ours, peer)}
        what = f"training memory, batch {args.batch}"
        rows.append(row(ours, peer, what, "cpu", memory))
    for line in rows:
        ours, peer = (f"{line[side]:7.1f}" for side in ("ours", "theirs"))
        print(
            f"{line['model']:24s} {line['what']:26s} {line['backend']:6s} {line['ratio']:5.2f} x {line['peer']}",
            ours,
            peer,
        )
    if args.json:
        args.json.write_text(
            json.dumps(dict(torch=torch.__version__, threads=args.threads, rows=rows), indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
