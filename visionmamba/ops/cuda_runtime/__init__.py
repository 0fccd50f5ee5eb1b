"""CUDA kernels at run time: NVRTC through cuda-core, a cubin cache on disk, and launches on torch's stream."""

from .compiler import CompileError, KernelError, available, compile_cubin, compile_log, nvrtc_version, source
from .launcher import Arguments, Kernel, Launcher, launcher, pointer, usable

__all__ = [
    "Arguments",
    "CompileError",
    "Kernel",
    "KernelError",
    "Launcher",
    "available",
    "compile_cubin",
    "compile_log",
    "launcher",
    "nvrtc_version",
    "pointer",
    "source",
    "usable",
]
