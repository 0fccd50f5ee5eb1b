"""What the Triton backends share: whether Triton can run here, and block sizes."""

from __future__ import annotations

import importlib.util
import os

import torch

__all__ = ["device_types", "interpreted", "power_of_two", "probe"]


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` asks for Triton's interpreter, which runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def device_types() -> tuple[str, ...]:
    """Return the device types that Triton kernels run on."""
    return ("cuda", "cpu") if interpreted() else ("cuda",)


def probe() -> str | None:
    """Return why Triton cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "no GPU (TRITON_INTERPRET=1 interprets the kernels)"
    return None


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()
