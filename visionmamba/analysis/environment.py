"""What a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = ["device_name", "environment", "nvml_device"]

_PACKAGES = ("torch", "timm", "triton", "numba", "cuda-core", "numpy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of a checkout, with a mark if it was changed; None for an installed package.

    ``VISIONMAMBA_COMMIT`` says it where there is no repository, as in a copy on another machine.
    """
    if os.environ.get("VISIONMAMBA_COMMIT"):
        return os.environ["VISIONMAMBA_COMMIT"]
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-changed" if changed.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name of a device's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def nvml_device(device: torch.device) -> tuple[Any, Any] | None:
    """Return NVML and its handle of a CUDA device; None where there is no NVML for Python (nvidia-ml-py)."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # no package, no library, no permission: energy and driver stay unknown
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a measurement's figures depend on, for a record beside them.

    Args:
        device: Device of the measurement.
    """
    from visionmamba import __version__

    nvml = nvml_device(device)
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": nvml[0].nvmlSystemGetDriverVersion() if nvml else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "visionmamba": __version__,
        "commit": _commit(),
        "backend": os.environ.get("VISIONMAMBA_BACKEND"),
        **{package: _version(package) for package in _PACKAGES},
    }
