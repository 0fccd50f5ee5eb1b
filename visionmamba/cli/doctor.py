"""``visionmamba doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Annotated, Any

import typer

from ._common import CommandError, JsonOption, console, print_json

_PACKAGES = (
    "visionmamba",
    "torch",
    "torchvision",
    "timm",
    "numba",
    "triton",
    "cuda-core",
    "onnx",
    "onedl-mmengine",
    "onedl-mmcv",
    "onedl-mmdetection",
    "onedl-mmsegmentation",
)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if versions["visionmamba"] is None:  # a plain checkout
        from visionmamba import __version__

        versions["visionmamba"] = __version__
    return versions


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [
        {
            "type": "cpu",
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    for index in range(torch.accelerator.device_count() if accelerator is not None else 0):
        device: dict[str, Any] = {"type": accelerator.type, "index": index}
        if accelerator.type == "cuda":
            properties = torch.cuda.get_device_properties(index)
            device["name"] = properties.name
            device["memory_gib"] = round(properties.total_memory / 2**30, 1)
            device["capability"] = f"{properties.major}.{properties.minor}"
            device["runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        devices.append(device)
    return devices


def _operators(device_types: list[str]) -> list[dict[str, Any]]:
    """Return for each operator and device type the backend that runs, and why the others do not."""
    from visionmamba.ops.backend import explain, operators, select

    rows = []
    for op in operators():
        for device_type in device_types:
            try:
                chosen = select(op, device_type).backend
            except (RuntimeError, ValueError):
                chosen = None
            rows.append({"op": op, "device": device_type, "backend": chosen, "backends": explain(op, device_type)})
    return rows


def _planned() -> list[str]:
    """Return the operators whose calls on a GPU are recorded."""
    import visionmamba.ops  # noqa: F401  (registers them)
    from visionmamba.ops._operator import planned_operators

    return planned_operators()


def _reason(row: dict[str, Any], backend: str, reason: str | None) -> str:
    if backend == row["backend"]:
        return "runs"
    return reason or "can run; another is preferred"


def _check_gpu(as_json: bool) -> None:
    """Run every kernel on the GPU and compare it with plain PyTorch; exit with status 1 if one fails."""
    import torch

    if not torch.cuda.is_available():
        raise CommandError("--gpu: this machine has no GPU that PyTorch can use, so there is no kernel to check")
    from ._kernel_checks import Check, check_kernels

    out = console()

    def show(check: Check) -> None:
        verdict = "[green]ok[/green]" if check.problem is None else f"[red]FAILED[/red] {check.problem}"
        error = "" if check.error is None else f"error {check.error:.1e}, "
        out.print(f"{check.op:24s}{check.backend:8s}{check.case:26s}{error}{check.seconds:.2f} s  {verdict}")

    checks = check_kernels("cuda", (lambda _check: None) if as_json else show)
    if as_json:
        print_json([check._asdict() for check in checks])
    if any(check.problem is not None for check in checks):
        raise typer.Exit(1)


def doctor(
    as_json: JsonOption = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Compile, run and check every kernel on the GPU.")] = False,
) -> None:
    """Say what this machine has, which backend each operator uses on it, and why not the others."""
    from rich.table import Table

    if gpu:
        _check_gpu(as_json)
        return
    devices = _devices()
    report: dict[str, Any] = {
        "platform": platform.platform(),
        "versions": _versions(),
        "devices": devices,
        "forced_backend": os.environ.get("VISIONMAMBA_BACKEND") or None,
        "planned_operators": _planned(),
        "operators": _operators(list(dict.fromkeys(device["type"] for device in devices))),
    }
    if as_json:
        print_json(report)
        return
    out = console()
    out.print(f"[bold]platform[/bold]  {report['platform']}")
    versions = Table("Package", "Version", box=None, header_style="bold")
    for package, version in report["versions"].items():
        versions.add_row(package, version or "not installed")
    out.print(versions)
    for device in devices:
        out.print("[bold]device[/bold]  " + ", ".join(f"{key} {value}" for key, value in device.items()))
    if report["forced_backend"]:
        out.print(f"[bold]VISIONMAMBA_BACKEND[/bold] forces {report['forced_backend']}")
    if any(device["type"] == "cuda" for device in devices):
        names = ", ".join(report["planned_operators"])
        out.print(f"[bold]recorded[/bold]  {names or 'nothing'} (VISIONMAMBA_PLANS=0: nothing)")
    table = Table("Operator", "Device", "Backend", "Why", box=None, header_style="bold")
    for row in report["operators"]:
        for backend, reason in row["backends"].items():
            mark = "[green]" if backend == row["backend"] else ""
            table.add_row(row["op"], row["device"], f"{mark}{backend}", _reason(row, backend, reason))
    out.print(table)
