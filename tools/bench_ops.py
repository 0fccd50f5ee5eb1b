"""Time the operators on one GPU, beside the floor and the peers' kernels where they are installed.

The floor of a row is the larger of two times: the bytes that must move over the measured copy bandwidth, and the
exponentials over the rate of the special-function units. Times are medians of a captured CUDA graph's replays, with the
L2 cache flushed before each; ``eager`` is the same call without the graph, which adds the host's share.

    python tools/bench_ops.py --output benchmarks/ops_h200
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from visionmamba.analysis.environment import environment
from visionmamba.ops import causal_conv1d, selective_scan
from visionmamba.ops.scan_path import scan_path

PEERS = Path(__file__).resolve().parent.parent / "benchmarks" / "peers_h200.json"


@dataclass(frozen=True)
class Case:
    """One row of the table: a selective scan as a model runs it."""

    batch: int
    path: str
    grid: tuple[int, ...]
    channels: int
    states: int
    gate: bool = False
    own_input: bool = False  # each direction has its own u (after a convolution), instead of one that all share


CROSS, BOTH, SNAKE = "h,v,h_flip,v_flip", "h,h_flip", "snake_h,snake_v,snake_h_flip,snake_v_flip"
CASES = {
    "vim_t": Case(128, BOTH, (197,), 384, 16, True, True),
    "vim_s": Case(128, BOTH, (197,), 768, 16, True, True),
    "vmamba_t_stage1": Case(128, CROSS, (56, 56), 96, 1),
    "vmamba_t_stage2": Case(128, CROSS, (28, 28), 192, 1),
    "vmamba_t_stage3": Case(128, CROSS, (14, 14), 384, 1),
    "vmamba_t_stage4": Case(128, CROSS, (7, 7), 768, 1),
    "vanilla_vmamba_stage1": Case(64, CROSS, (56, 56), 192, 16),
    "vanilla_vmamba_stage3": Case(64, CROSS, (14, 14), 768, 16),
    "plainmamba": Case(128, SNAKE, (14, 14), 384, 16),
    "efficient_vmamba_stage1": Case(128, "sub_200,subT_210,sub_201,subT_211", (56, 56), 96, 16),
    "language_2k": Case(8, "h", (2048,), 2048, 16, True),
    "language_64k": Case(1, "h", (65536,), 2048, 16, True),
    "vim_t_1248": Case(8, BOTH, (6085,), 384, 16, True, True),
    "vmamba_t_stage1_800x1280": Case(2, CROSS, (200, 320), 96, 1),
    "vmamba_t_stage3_800x1280": Case(2, CROSS, (50, 80), 384, 1),
    "vmamba_t_stage1_1248": Case(2, CROSS, (312, 312), 96, 1),
}


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cuda") -> list[torch.Tensor | None]:
    """Draw the ten tensor arguments of ``selective_scan``."""
    table = scan_path(case.path, case.grid)
    batch, tokens, directions, channels, states = (
        case.batch, table.num_tokens, table.num_directions, case.channels, case.states
    )  # fmt: skip

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=kind)

    middle = (directions,) if case.own_input else ()
    decay = torch.arange(1, states + 1, device=device, dtype=torch.float32)
    return [
        draw(batch, tokens, *middle, channels),
        draw(batch, tokens, directions, channels),
        -(decay * torch.ones(directions, channels, 1, device=device)),
        draw(batch, tokens, directions, states),
        draw(batch, tokens, directions, states),
        torch.ones(directions, channels, device=device),
        draw(batch, tokens, channels) if case.gate else None,
        draw(directions, channels, kind=torch.float32) * 0.5 - 4,
        None,
        None,
    ]


class Timer:
    """Times functions on the GPU with a cold L2 cache."""

    def __init__(self, repeats: int = 20) -> None:
        self.repeats = repeats
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def median(self, function: Callable[[], object]) -> float:
        """Return the median time of a call in milliseconds."""
        times = []
        for _ in range(self.repeats):
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def graph(self, function: Callable[[], object]) -> float:
        """Return the median time of a captured call in milliseconds."""
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            function()
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        graph.replay()
        return self.median(graph.replay)


def copy_bandwidth(timer: Timer) -> float:
    """Return the bandwidth of a large device copy in bytes a millisecond, read plus written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / timer.median(lambda: target.copy_(source))


def floors(case: Case, inputs: list[torch.Tensor | None], bandwidth: float) -> tuple[float, float]:
    """Return the forward's and the backward's floor in milliseconds."""
    sizes = [0 if x is None else x.numel() * x.element_size() for x in inputs]
    table = scan_path(case.path, case.grid)
    out = case.batch * table.num_tokens * case.channels * inputs[0].element_size()
    steps = case.batch * int((table.order >= 0).sum()) * case.channels
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 1_980_000)  # cycles a millisecond
    exponentials = steps * (case.states + 2) / (properties.multi_processor_count * 16 * clock)
    return max((sum(sizes) + out) / bandwidth, exponentials), max((2 * sum(sizes) + out) / bandwidth, exponentials)


def time_scan(case: Case, timer: Timer, dtype: torch.dtype) -> dict[str, float]:
    """Time the forward and the backward of one row."""
    inputs = make_inputs(case, dtype)
    options = (case.path, list(case.grid), True, True, False)
    dy = torch.randn_like(selective_scan(*inputs, *options)[0])
    backward = torch.ops.visionmamba.selective_scan_backward

    def eager() -> None:
        selective_scan(*inputs, *options)

    with torch.no_grad():
        return {
            "forward": timer.graph(eager),
            "backward": timer.graph(lambda: backward(dy, None, *inputs, *options)),
            "forward_eager": timer.median(eager),
        }


def time_conv(timer: Timer, dtype: torch.dtype) -> dict[str, float]:
    """Time the causal convolution of the peers' table: B128 D384 L197 W4 with SiLU, one direction."""
    x = torch.randn(128, 197, 384, device="cuda", dtype=dtype)
    weight, bias = torch.randn(1, 384, 4, device="cuda"), torch.randn(1, 384, device="cuda")
    dout = torch.randn(128, 197, 1, 384, device="cuda", dtype=dtype)
    options = (None, None, "h", [197], True)
    backward = torch.ops.visionmamba.causal_conv1d_backward
    with torch.no_grad():
        return {
            "forward": timer.graph(lambda: causal_conv1d(x, weight, bias, *options)),
            "backward": timer.graph(lambda: backward(dout, None, x, weight, bias, *options)),
            "forward_eager": timer.median(lambda: causal_conv1d(x, weight, bias, *options)),
        }


def provenance() -> dict[str, str]:
    """Return what the figures belong to."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": output("nvidia-smi", "-i", "0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": environment(torch.device("cuda"))["commit"] or "",
    }


def mamba_ssm_scan() -> Callable[..., torch.Tensor] | None:
    """Return mamba_ssm's scan if it is installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def time_mamba_ssm(case: Case, timer: Timer, dtype: torch.dtype) -> dict[str, float]:
    """Time mamba_ssm's scan on the same work, all directions as groups, without flips, cross-scan and merge."""
    scan = mamba_ssm_scan()
    if scan is None:
        return {}
    table = scan_path(case.path, case.grid)
    wide, length = table.num_directions * case.channels, table.num_steps
    u, delta = (torch.randn(case.batch, wide, length, device="cuda", dtype=dtype) for _ in range(2))
    shape = (case.batch, table.num_directions, case.states, length)
    B, C = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    A = -torch.rand(wide, case.states, device="cuda")
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C)]
    y = scan(*inputs, delta_softplus=True)
    dy = torch.randn_like(y)
    return {
        "mamba_ssm_forward": timer.median(lambda: scan(*[x.detach() for x in inputs], delta_softplus=True)),
        "mamba_ssm_backward": timer.median(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="path without suffix: writes .csv and .json")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    dtype, timer = getattr(torch, arguments.dtype), Timer(arguments.repeats)
    bandwidth = copy_bandwidth(timer)
    torch.cuda.empty_cache()
    peers = json.loads(PEERS.read_text())["rows"] if PEERS.exists() else {}
    rows = []
    for name in arguments.cases:
        case = CASES[name]
        inputs = make_inputs(case, dtype)
        floor = dict(zip(("floor_forward", "floor_backward"), floors(case, inputs, bandwidth), strict=True))
        del inputs
        rows.append({"case": name, **time_scan(case, timer, dtype), **floor, **time_mamba_ssm(case, timer, dtype)})
        rows[-1].update({f"peer_{key}": value for key, value in peers.get(name, {}).items()})
        torch.cuda.empty_cache()
        print(row_text(rows[-1]), flush=True)
    rows.append({"case": "causal_conv1d", **time_conv(timer, dtype)})
    rows[-1].update({f"peer_{key}": value for key, value in peers.get("causal_conv1d", {}).items()})
    print(row_text(rows[-1]), flush=True)
    if arguments.output:
        write(arguments.output, rows, {"copy_TB_s": bandwidth / 1e9, "dtype": arguments.dtype, **provenance()})


def row_text(row: dict) -> str:
    """Format a row for the terminal."""
    text = f"{row['case']:28s} forward {row['forward']:8.4f}  backward {row['backward']:8.4f} ms"
    if "floor_forward" in row:
        text += f"  floor {row['floor_forward']:.4f} {row['floor_backward']:.4f}"
    if "peer_forward" in row:
        text += f"  peers {row['peer_forward']:.3f} {row['peer_backward']:.3f}"
    return text + f"  eager {row['forward_eager']:.4f}"


def write(path: Path, rows: list[dict], about: dict) -> None:
    """Write the table as CSV and JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
