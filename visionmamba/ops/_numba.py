"""Runtime of the CPU kernels: compiles them once a machine, keeps them on disk, and runs them on torch's threads."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import sys
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

__all__ = ["cache_directory", "compile_kernel", "probe", "run"]

_logger = logging.getLogger("visionmamba")
_lock = threading.Lock()
_announced = False


def cache_directory() -> Path:
    """Return the folder for compiled kernels: ``VISIONMAMBA_CACHE_DIR``, else the platform's cache folder."""
    chosen = os.environ.get("VISIONMAMBA_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "visionmamba"


@cache
def _kernel_cache() -> Path | None:
    """Create the folder for these sources, this numba and this processor; None where nothing can be written."""
    import llvmlite.binding
    import numba

    from visionmamba.kernels import cpu

    key = hashlib.sha256()
    for source in sorted(Path(next(iter(cpu.__path__))).glob("*.py")):
        key.update(source.name.encode() + source.read_bytes())
    # Two machines that share a home folder must not read each other's code.
    features = sorted(name for name, present in llvmlite.binding.get_host_cpu_features().items() if present)
    for part in (numba.__version__, llvmlite.__version__, sys.version, llvmlite.binding.get_host_cpu_name(), *features):
        key.update(part.encode())
    try:
        folder = cache_directory() / "cpu" / key.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".writable-{os.getpid()}-{threading.get_ident()}", "wb") as file:
            os.unlink(file.name) if os.name == "posix" else None
    except (OSError, RuntimeError):
        return None
    return folder


@contextlib.contextmanager
def _numba_cache(folder: Path | None) -> Iterator[None]:
    """Let numba keep what is compiled inside in ``folder``, one process at a time, without changing its settings."""
    if folder is None:
        yield
        return
    from filelock import FileLock
    from numba.core import config

    with FileLock(folder / "lock"):
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
        try:
            yield
        finally:
            config.CACHE_DIR = before


def _announce(folder: Path | None) -> None:
    """Say once that compiling takes some seconds."""
    global _announced
    if not _announced:
        where = f"they are kept in {folder}" if folder else "they cannot be kept on disk: set VISIONMAMBA_CACHE_DIR"
        _logger.warning("visionmamba: compiling the CPU kernels, a few seconds (%s)", where)
        _announced = True


@cache
def _compile(module: str, function: str):
    import importlib

    from numba import cfunc, types

    folder = _kernel_cache()
    source = importlib.import_module(f"visionmamba.kernels.cpu.{module}")
    if folder is None or not any(folder.rglob(f"{module}.{function}-*.nbi")):
        _announce(folder)
    with _numba_cache(folder):
        return cfunc(types.void(types.voidptr), cache=folder is not None)(getattr(source, function))


def compile_kernel(module: str, function: str) -> Kernel:
    """Compile a kernel, or load it from the disk.

    Args:
        module: Module in ``visionmamba.kernels.cpu``.
        function: Its function that takes the address of a record of the call.

    Returns:
        The kernel, ready for :func:`run`.
    """
    with _lock:
        return _kernel(module, function)


class Kernel:
    """A compiled kernel: a function of one address that does not need Python's lock."""

    def __init__(self, compiled):
        self._keep_alive = compiled
        self.address = compiled.address
        self.call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


@cache
def _kernel(module: str, function: str) -> Kernel:
    return Kernel(_compile(module, function))


def probe(module: str, *functions: str) -> str | None:
    """Compile kernels; return why they cannot be used here, or None."""
    try:
        for function in functions:
            compile_kernel(module, function)
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    except Exception as error:
        return f"numba cannot compile the kernels here ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


@cache
def _openmp_parallel():
    """Return ``GOMP_parallel`` of the OpenMP runtime that torch has loaded, or None.

    Running on torch's own threads matters: they spin for some milliseconds after each of torch's operators, and threads
    of another pool would have to fight them for the cores.
    """
    if not torch.backends.openmp.is_available() or not hasattr(os, "RTLD_NOLOAD"):
        return None
    library_folder = Path(torch.__file__).parent / "lib"
    candidates = [
        str(path) for pattern in ("libgomp*", "libiomp5*", "libomp*") for path in library_folder.glob(pattern)
    ]
    for name in (*candidates, "libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.dylib"):
        try:
            function = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        function.restype = None
        return function
    return None


class _Pool:
    """A thread pool that a forked child replaces: a child has none of its parent's threads."""

    def __init__(self):
        self.executor: ThreadPoolExecutor | None = None
        self.forked = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.after_fork)

    def after_fork(self):
        self.executor, self.forked = None, True

    def run(self, kernel: Kernel, address: int, threads: int) -> None:
        if self.executor is None:
            self.executor = ThreadPoolExecutor(max(1, os.cpu_count() or 1), "visionmamba")
        others = [self.executor.submit(kernel.call, address) for _ in range(threads - 1)]
        kernel.call(address)
        for other in others:
            other.result()


_pool = _Pool()


def run(kernel: Kernel, record: array, threads: int) -> None:
    """Run a kernel on several threads, which share its tasks.

    Args:
        kernel: What to run.
        record: The call's record of int64; its first field receives the address of the threads' counters.
        threads: How many threads; 1 runs it right here.
    """
    counters = array("q", (0, 0))
    record[0] = counters.buffer_info()[0]
    address = record.buffer_info()[0]
    if threads <= 1:
        kernel.call(address)
        return
    parallel = None if _pool.forked else _openmp_parallel()
    if parallel is None:
        _pool.run(kernel, address, threads)
    else:
        parallel(kernel.address, address, threads, 0)
