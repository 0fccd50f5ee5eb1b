"""Whole models on one GPU, beside others: ``python tools/bench_models.py SECTION [SECTION ...] --output FOLDER``.

Sections: ``zoo`` (the measured backbones and timm's, inference and training, eager and as a CUDA graph), ``single``
(one image), ``compiled`` (through torch.compile), ``families`` (one model of each other family, beside its plain
PyTorch form), ``resolution`` (Vim-T beside DeiT-T with flash attention on large images) and ``detection`` (backbones at
800x1280, forward and backward). All under bfloat16 autocast. A section's rows go to ``FOLDER/SECTION.json``, replaced
whole.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch

import visionmamba
from visionmamba._files import replacing
from visionmamba.analysis.bench import create_for_size

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
BACKBONES = ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224", "convnext_tiny")

Step = Callable[[], None]


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


def milliseconds(step: Step, repeats: int, warmup: int = 3) -> float:
    """Return the median time of a step."""
    for _ in range(warmup):
        step()
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


def peak_gib(step: Step) -> float:
    """Return the most memory that a step holds, weights and all."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(model: torch.nn.Module, x: torch.Tensor, training: bool, runs: list[str], repeats: int) -> list[dict]:
    """Return a row for each way to run a model: its time, images a second, and (eager) peak memory.

    Args:
        model: The model.
        x: Its input.
        training: Whether backward is part of a step.
        runs: Of ``"eager"``, ``"graph"`` and ``"compile"``.
        repeats: Steps that are timed.
    """
    rows = []
    for run in runs:
        row = {"mode": "train" if training else "infer", "run": run, "batch": len(x)}
        try:
            step = make_step(torch.compile(model) if run == "compile" else model, x, training, run != "graph")
            if run != "graph":
                row["peak_gib"] = round(peak_gib(step), 3)
            time = milliseconds(replayed(step) if run == "graph" else step, repeats)
            row |= {"ms": round(time, 3), "images_per_second": round(1e3 * len(x) / time, 1)}
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["error"] = " ".join(str(error).split())[:200]
        rows.append(row)
    return rows


@contextlib.contextmanager
def created(name: str, size: tuple[int, int], **options) -> Iterator[torch.nn.Module]:
    """Create a model on the GPU, and leave the GPU's memory empty behind it."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).cuda() if options else create_for_size(name, size, "cuda")
    yield model
    model.zero_grad(set_to_none=True)
    del model
    gc.collect()
    torch.cuda.empty_cache()


def zoo(repeats: int) -> Iterator[dict]:
    """The measured backbones and timm's at 224 pixels, batch 128."""
    for name in ZOO:
        with created(name, (224, 224)) as model:
            x = torch.randn(128, 3, 224, 224, device="cuda")
            for training in (False, True):
                for row in measure(model, x, training, ["eager", "graph"], repeats):
                    yield {"model": name, **row}


def single(repeats: int) -> Iterator[dict]:
    """Inference of one image, which waits for launches unless it is a graph."""
    for name in ZOO:
        with created(name, (224, 224)) as model:
            x = torch.randn(1, 3, 224, 224, device="cuda")
            for row in measure(model, x, False, ["eager", "graph"], repeats):
                yield {"model": name, **row}


def compile_one(name: str, repeats: int, lock: Path) -> Iterator[dict]:
    """One model through torch.compile; others may compile at the same time, but none is timed then."""
    with created(name, (224, 224)) as model, lock.open("r+") as file:
        x = torch.randn(128, 3, 224, 224, device="cuda")
        fcntl.flock(file, fcntl.LOCK_SH)
        for training in (False, True):
            make_step(torch.compile(model), x, training)()
            torch.cuda.synchronize()
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.flock(file, fcntl.LOCK_EX)
        for training in (False, True):
            for row in measure(model, x, training, ["compile"], repeats):
                yield {"model": name, **row}


def compiled(repeats: int) -> Iterator[dict]:
    """Some models through torch.compile: each in a process of its own, compiling together and timed one by one."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "lock"
        lock.touch()
        arguments = [sys.executable, __file__, "compile_one", "--repeats", str(repeats), "--lock", str(lock)]
        started = [
            subprocess.Popen([*arguments, "--model", name, "--output", f"{folder}/{name}"], stdout=subprocess.DEVNULL)
            for name in COMPILED
        ]
        for process, name in zip(started, COMPILED, strict=True):
            if process.wait() == 0:
                yield from json.loads((Path(folder) / name / "compile_one.json").read_text())["rows"]
            else:
                yield {"model": name, "run": "compile", "error": f"exit status {process.returncode}"}


def families(repeats: int) -> Iterator[dict]:
    """One model of each family, as it runs here and in plain PyTorch."""
    for name in FAMILIES:
        with created(name, (224, 224)) as model:
            x = torch.randn(32, 3, 224, 224, device="cuda")
            for training in (False, True):
                for row in measure(model, x, training, ["eager", "graph"], repeats):
                    yield {"model": name, "backend": "best", **row}
                with visionmamba.backend("torch"):
                    step = make_step(model, x, training)
                    row = {"mode": "train" if training else "infer", "run": "eager", "batch": 32}
                    row["peak_gib"] = round(peak_gib(step), 3)
                    time = milliseconds(step, 1, warmup=0)
                    row |= {"ms": round(time, 3), "images_per_second": round(32e3 / time, 1)}
                yield {"model": name, "backend": "torch", **row}


def resolution(repeats: int) -> Iterator[dict]:
    """Vim-T and DeiT-T on large images."""
    for size, batch in RESOLUTIONS.items():
        for name in ("vim_tiny_patch16_224", "deit_tiny_patch16_224"):
            with created(name, (size, size), img_size=size) as model:
                x = torch.randn(batch, 3, size, size, device="cuda")
                for training in (False, True):
                    flash = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
                    with flash:
                        for row in measure(model, x, training, ["eager", "graph"], max(3, repeats // 2)):
                            yield {"model": name, "size": size, **row}


def detection(repeats: int) -> Iterator[dict]:
    """Backbones' four maps of two images of 800x1280, forward and backward."""
    for name in BACKBONES:
        options = dict(img_size=(800, 1280)) if name.startswith("swin") else {}
        with created(name, (800, 1280), features_only=True, **options) as model:
            x = torch.randn(2, 3, 800, 1280, device="cuda")
            for row in measure(model, x, True, ["eager", "graph"], repeats):
                yield {"model": name, "size": "800x1280", **row}


SECTIONS = {
    "zoo": zoo, "single": single, "compiled": compiled, "families": families, "resolution": resolution,
    "detection": detection,
}  # fmt: skip


def write(folder: Path, section: str, rows: Iterator[dict]) -> None:
    """Collect a section's rows and write them with what they were measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows:
        found.append(row)
        print(json.dumps(row), flush=True)
    environment = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "timm": timm.__version__}
    with replacing(folder / f"{section}.json") as temporary:
        temporary.write_text(json.dumps({"environment": environment, "rows": found}, indent=1) + "\n")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="+", choices=[*SECTIONS, "compile_one"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/models"))
    parser.add_argument("--repeats", type=int, default=10, help="steps that are timed")
    parser.add_argument("--model", help="of compile_one")
    parser.add_argument("--lock", type=Path, help="of compile_one: a file that processes share")
    arguments = parser.parse_args()
    for section in arguments.sections:
        if section == "compile_one":
            rows = compile_one(arguments.model, arguments.repeats, arguments.lock)
        else:
            rows = SECTIONS[section](arguments.repeats)
        write(arguments.output, section, rows)


if __name__ == "__main__":
    main()
