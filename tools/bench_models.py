"""Whole models on one GPU, beside others: ``python tools/bench_models.py SECTION [SECTION ...] --output FOLDER``.

Sections: ``zoo`` (the measured backbones and timm's, inference and training, eager and as a CUDA graph), ``families``
(one model of each family, beside its plain PyTorch form), ``detection`` (backbones at 800x1280, forward and backward),
``resolution`` (Vim-T beside DeiT-T with flash attention on large images), ``single`` (one image), ``same`` (whether
eager models, graphs and repeated steps give the same bits) and ``compiled`` (through torch.compile). All under
bfloat16 autocast, and in this order. A section's rows go to ``FOLDER/SECTION.json`` after every case; a case that fails
is a row with its error, and ``--resume`` leaves out the cases that are there already. ``--warm 8`` first compiles what
the kernels need, in as many processes.

``python tools/bench_models.py --table benchmarks/PERFORMANCE.md --output FOLDER`` writes the rows into a page's tables.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import model_tables
import timm
import torch

import visionmamba
from visionmamba._files import replacing
from visionmamba._text import one_line
from visionmamba.analysis.bench import create_for_size, memory_before
from visionmamba.analysis.environment import environment

ZOO = (
    "vmamba_tiny_s1l8", "vmamba_small_s1l20", "vmamba_base_s1l20", "vim_tiny_patch16_224", "vim_small_patch16_224",
    "convnext_tiny", "swin_tiny_patch4_window7_224", "deit_small_patch16_224", "deit_tiny_patch16_224",
)  # fmt: skip
COMPILED = ("vmamba_tiny_s1l8", "vim_tiny_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224")
FAMILIES = (
    "vmamba_tiny_s1l8", "vim_tiny_patch16_224", "plainmamba_l1", "local_vim_tiny", "local_vssm_tiny",
    "efficient_vmamba_tiny", "mamba2d_small_patch16_224",
)  # fmt: skip
RESOLUTIONS = {512: 32, 1024: 8, 1248: 8, 2048: 2}  # pixels: images a batch
LARGE = ("vim_tiny_patch16_224", "deit_tiny_patch16_224")
BACKBONES = ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224", "convnext_tiny")
FAMILY_BATCH = 32
ENOUGH_SECONDS = 0.7  # of the same step

Step = Callable[[], None]
Rows = Iterator[dict]


def make_step(model: torch.nn.Module, x: torch.Tensor, training: bool, cache: bool = True) -> Step:
    """Return a step of inference, or forward and backward, under autocast.

    Args:
        model: The model.
        x: Its input.
        training: Whether backward is part of it.
        cache: Whether autocast keeps its casts of the weights for the step's length; not in a graph.
    """
    model.train(training)

    def step() -> None:
        if training:
            model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16, cache_enabled=cache):
            outputs = model(x)
        if training:
            outputs = outputs if isinstance(outputs, list) else [outputs]
            sum(out.float().square().mean() for out in outputs).backward()

    return step


def milliseconds(step: Step, repeats: int, warmup: int = 10) -> float:
    """Return the median time of steps that follow one another; of fewer than ``repeats`` where they would take long."""
    taken: list[float] = []
    while len(taken) < warmup and (len(taken) < 2 or sum(taken) < ENOUGH_SECONDS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    if taken:
        repeats = min(repeats, max(3, round(ENOUGH_SECONDS / taken[-1])))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def replayed(step: Step) -> Step:
    """Return a step's replay as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def failure(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {one_line(error, 200)}"


def measure(
    model: torch.nn.Module, x: torch.Tensor, training: bool, runs: list[str], repeats: int, warmup: int = 10
) -> Rows:
    """Return a row for each way to run a model: its time, images a second, and (but for graphs) peak memory.

    The memory is the most that a step holds, weights and all, without what runs before it have left; the first step is
    not looked at.

    Args:
        model: The model.
        x: Its input.
        training: Whether backward is part of a step.
        runs: Of ``"eager"``, ``"graph"``, ``"compile"`` and ``"compile graph"``, the compiled step as a graph.
        repeats: Steps that are timed; for none, a single step compiles what the others would need.
        warmup: Steps before them, after the first.
    """
    for run in runs if repeats else ["eager"]:
        row = {"mode": "train" if training else "infer", "run": run, "batch": len(x)}
        memory_before(x.device)
        try:
            step = make_step(torch.compile(model) if run.startswith("compile") else model, x, training, run != "graph")
            if run.endswith("graph"):
                step = replayed(step)
            step()
            torch.cuda.synchronize()
            if not repeats:
                continue
            torch.cuda.reset_peak_memory_stats()
            taken = milliseconds(step, repeats, warmup)
            row |= {"ms": round(taken, 3), "images_per_second": round(1e3 * len(x) / taken, 1)}
            if not run.endswith("graph"):
                row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        except RuntimeError as error:  # among them: out of memory
            row["error"] = failure(error)
        yield row


@contextlib.contextmanager
def created(name: str, size: tuple[int, int] = (224, 224), **options) -> Iterator[torch.nn.Module]:
    """Create a model on the GPU, and leave the GPU's memory empty behind it."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).cuda() if options else create_for_size(name, size, "cuda")
    try:
        yield model
    finally:
        model.zero_grad(set_to_none=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def zoo(case: dict, repeats: int) -> Rows:
    """A model at 224 pixels, batch 128."""
    with created(case["model"]) as model:
        x = torch.randn(128, 3, 224, 224, device="cuda")
        for training in (False, True):
            yield from measure(model, x, training, ["eager", "graph"], repeats)


def single(case: dict, repeats: int) -> Rows:
    """Inference of one image, which waits for launches unless it is a graph."""
    with created(case["model"]) as model:
        yield from measure(model, torch.randn(1, 3, 224, 224, device="cuda"), False, ["eager", "graph"], repeats)


def compile_one(case: dict, repeats: int, lock: Path) -> Rows:
    """One model through torch.compile; others may compile at the same time, but none is timed then."""
    with created(case["model"]) as model, lock.open("r+") as file:
        x = torch.randn(128, 3, 224, 224, device="cuda")
        fcntl.flock(file, fcntl.LOCK_SH)
        for training in (False, True):
            make_step(torch.compile(model), x, training)()
            torch.cuda.synchronize()
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.flock(file, fcntl.LOCK_EX)
        model.eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            eager, found = model(x).float(), torch.compile(model)(x).float()
        difference = float((found - eager).norm() / eager.norm())
        for training in (False, True):
            for row in measure(model, x, training, ["compile", "compile graph"], repeats):
                yield row | ({} if training else {"difference_from_eager": difference})


@functools.cache
def _compiling(repeats: int) -> tuple[dict[str, tuple[subprocess.Popen, Path]], TextIO]:
    """Start a process for each model that is compiled; they compile together and are timed one by one.

    Returns:
        The processes and their results' files; and a lock that keeps them from being timed until it is given back.
    """
    folder = Path(tempfile.mkdtemp())
    lock = folder / "lock"
    lock.touch()
    file = lock.open("r+")
    fcntl.flock(file, fcntl.LOCK_SH)
    arguments = [sys.executable, __file__, "compile_one", "--repeats", str(repeats), "--lock", str(lock)]
    started = {}
    for name in COMPILED:
        command = [*arguments, "--model", name, "--output", str(folder / name)]
        started[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL), folder / name / "compile_one.json"
        atexit.register(started[name][0].kill)
    return started, file


def compiled(case: dict, repeats: int) -> Rows:
    """A model through torch.compile."""
    started, lock = _compiling(repeats)
    fcntl.flock(lock, fcntl.LOCK_UN)
    process, path = started[case["model"]]
    if process.wait() != 0:
        raise RuntimeError(f"exit status {process.returncode}")
    yield from json.loads(path.read_text())["rows"]


def families(case: dict, repeats: int) -> Rows:
    """A model of a family, as it runs here or in plain PyTorch."""
    with created(case["model"]) as model:
        x = torch.randn(FAMILY_BATCH, 3, 224, 224, device="cuda")
        for training in (False, True):
            if case["backend"] == "best":
                yield from measure(model, x, training, ["eager", "graph"], repeats)
            else:
                with visionmamba.backend("torch"):
                    yield from measure(model, x, training, ["eager"], 1, warmup=0)


def resolution(case: dict, repeats: int) -> Rows:
    """Vim-T or DeiT-T on large images; attention is flash attention or nothing."""
    name, size = case["model"], case["size"]
    flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    with created(name, img_size=size) as model, flash:
        x = torch.randn(RESOLUTIONS[size], 3, size, size, device="cuda")
        for training in (False, True):
            yield from measure(model, x, training, ["eager", "graph"], min(repeats, max(3, repeats // 2)))


def detection(case: dict, repeats: int) -> Rows:
    """A backbone's four maps of two images of 800x1280, forward and backward."""
    options = dict(img_size=(800, 1280)) if case["model"].startswith("swin") else {}
    with created(case["model"], features_only=True, **options) as model:
        yield from measure(model, torch.randn(2, 3, 800, 1280, device="cuda"), True, ["eager", "graph"], repeats)


def same(case: dict, repeats: int) -> Rows:
    """Whether a graph's output is the eager model's, and two training steps' gradients are each other's, to the bit."""
    torch.use_deterministic_algorithms(True)
    with created(case["model"]) as model:
        x = torch.randn(8, 3, 224, 224, device="cuda")
        model.eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            eager = model(x)
        graphed = visionmamba.graph(model, x, torch.bfloat16)(x)
        step = make_step(model, x, True)
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            step()
            found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        steps = all(torch.equal(*pair) for pair in zip(*found, strict=True))
        yield {"graph_equals_eager": torch.equal(eager, graphed), "two_training_steps_are_equal": steps}


SECTIONS: dict[str, tuple[Callable[[dict, int], Rows], list[dict]]] = {  # the first matter most
    "zoo": (zoo, [{"model": name} for name in ZOO]),
    "families": (families, [{"model": name, "backend": kind} for kind in ("best", "torch") for name in FAMILIES]),
    "detection": (detection, [{"model": name, "size": "800x1280"} for name in BACKBONES]),
    "resolution": (resolution, [{"model": name, "size": size} for size in RESOLUTIONS for name in LARGE]),
    "single": (single, [{"model": name} for name in ZOO]),
    "same": (same, [{"model": name} for name in FAMILIES]),
    "compiled": (compiled, [{"model": name} for name in COMPILED]),
}


def write(path: Path, rows: list[dict]) -> None:
    """Write a section's rows with what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        record = {"environment": environment(torch.device("cuda")), "rows": rows}
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def run_case(measure_case: Callable[[dict, int], Rows], case: dict, repeats: int) -> Rows:
    """Yield a case's rows; what it fails of is a row, too."""
    try:
        for row in measure_case(case, repeats):
            yield case | row
    except Exception as error:
        yield case | {"error": failure(error)}


def uses_kernels(case: dict) -> bool:
    """Whether a case compiles this package's kernels."""
    return case.get("backend") != "torch" and not case["model"].startswith(("convnext", "swin", "deit"))


def share_of(section: str, sections: list[str], own: int, processes: int) -> list[dict]:
    """Return the cases of a section that one of several processes runs: it gets every so many of all the sections'."""
    wanted = [(name, case) for name in sections for case in SECTIONS[name][1] if uses_kernels(case)]
    return [case for name, case in wanted[own::processes] if name == section]


def warm_up(sections: list[str], processes: int) -> None:
    """Run every case that compiles kernels once, in several processes, so that the cache on disk has them."""
    sections = [section for section in sections if section not in ("compiled", "same")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sections, "--repeats", "0", "--output"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = [
            subprocess.Popen([*command, f"{folder}/{i}", "--share", str(i), str(processes)], **quiet)
            for i in range(processes)
        ]
        for process in started:
            process.wait()


def run_section(section: str, arguments: argparse.Namespace, started: float) -> None:
    """Measure a section's cases, and write what there is after each."""
    measure_case, cases = SECTIONS[section]
    if arguments.share:
        cases = share_of(section, arguments.sections, *arguments.share)
    path, rows = arguments.output / f"{section}.json", []
    if arguments.resume and path.exists():
        rows = [row for row in json.loads(path.read_text())["rows"] if "error" not in row]
    for number, case in enumerate(cases, 1):
        if any(case.items() <= row.items() for row in rows):
            continue
        if arguments.seconds and time.time() - started > arguments.seconds:
            print(f"{section}: no time for {len(cases) - number + 1} of {len(cases)} cases", file=sys.stderr)
            return
        begun = time.time()
        for row in run_case(measure_case, case, arguments.repeats):
            rows.append(row)
            print(json.dumps(row), flush=True)
        write(path, rows)
        spent = f"{time.time() - begun:.1f} s, {time.time() - started:.0f} s in all"
        print(f"{section} {number}/{len(cases)} {case['model']}: {spent}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/models"))
    parser.add_argument("--repeats", type=int, default=10, help="steps that are timed")
    parser.add_argument("--seconds", type=float, help="start no case after so many")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--warm", type=int, metavar="PROCESSES", help="compile the kernels first")
    parser.add_argument("--share", type=int, nargs=2, help="of --warm: which cases, of how many shares")
    parser.add_argument("--table", type=Path, help="write the rows in OUTPUT into this page's tables")
    parser.add_argument("--model", help="of compile_one")
    parser.add_argument("--lock", type=Path, help="of compile_one: a file that processes share")
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - {*SECTIONS, "compile_one"}
    if unknown:
        parser.error(f"sections: expected {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    return arguments


def main() -> None:
    """Measure, or write tables."""
    arguments, started = parse(), time.time()
    warnings.simplefilter("ignore")
    if arguments.table:
        model_tables.update(arguments.table, arguments.output)
        return
    if arguments.warm:
        warm_up(arguments.sections, arguments.warm)
        print(f"warm after {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    if arguments.sections == ["same"]:  # deterministic products need it before the library starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if arguments.sections == ["compile_one"]:
        rows = compile_one({"model": arguments.model}, arguments.repeats, arguments.lock)
        write(arguments.output / "compile_one.json", list(rows))
        return
    for section in (section for section in SECTIONS if section in arguments.sections):
        if section == "same" and arguments.sections != ["same"]:
            if "compiled" in arguments.sections:
                _compiling(arguments.repeats)  # meanwhile: nothing is timed
            options = ["--output", str(arguments.output), *(["--resume"] if arguments.resume else [])]
            subprocess.run([sys.executable, __file__, "same", *options], check=False)
        else:
            run_section(section, arguments, started)


if __name__ == "__main__":
    main()
