"""CUDA kernels at run time: NVRTC through cuda-core, a cubin cache on disk, and launches on torch's stream."""

from .compiler import CompileError, KernelError, available, compile_cubin, compile_log, nvrtc_version, source
from .launcher import Address, Arguments, Kernel, Launcher, Prepared, launcher, pointer, usable, watch_launches

__all__ = [
    "Address",
    "Arguments",
    "CompileError",
    "Kernel",
    "KernelError",
    "Launcher",
    "Prepared",
    "available",
    "compile_cubin",
    "compile_log",
    "launcher",
    "nvrtc_version",
    "pointer",
    "source",
    "usable",
    "watch_launches",
]
