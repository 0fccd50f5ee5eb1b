"""Compile a kernel file for one architecture, once: from memory, from the cache on disk, or by NVRTC."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = [
    "CompileError",
    "KernelError",
    "available",
    "cache_directory",
    "compile_cubin",
    "compile_log",
    "nvrtc_version",
    "source",
]

_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
_lock = threading.Lock()
_cubins: dict[str, bytes] = {}


class KernelError(RuntimeError):
    """A kernel cannot run on this machine: the operators then fall back to another backend."""


class CompileError(KernelError):
    """A kernel could not be compiled."""


@cache
def available() -> str | None:
    """Return None if kernels can be compiled here, else the reason why not."""
    try:
        nvrtc_version()
    except ImportError as error:
        return f"cuda-core or cuda-bindings is not installed ({error})"
    except Exception as error:
        return f"NVRTC cannot be loaded ({error})"
    return None


@cache
def nvrtc_version() -> tuple[int, int]:
    """Return NVRTC's version, e.g. (13, 0)."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise CompileError(f"nvrtcVersion failed with status {int(status)}")
    return major, minor


@cache
def source(name: str) -> str:
    """Return the text of ``kernels/cuda/<name>`` with its includes inlined.

    Args:
        name: File name, e.g. ``"scan_forward.cu"``.
    """
    folder = resources.files("visionmamba.kernels.cuda")

    def inline(match: re.Match[str]) -> str:
        return folder.joinpath(match[1]).read_text()

    return _INCLUDE.sub(inline, folder.joinpath(name).read_text())


def cache_directory() -> Path:
    """Return the folder of compiled kernels: ``VISIONMAMBA_CACHE_DIR``, or the user's cache folder."""
    chosen = os.environ.get("VISIONMAMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home())
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "visionmamba" / "cubin"


def _key(text: str, macros: Mapping[str, int], architecture: str) -> str:
    from visionmamba import __version__

    parts = [
        text,
        architecture,
        __version__,
        *map(str, nvrtc_version()),
        *(f"{k}={v}" for k, v in sorted(macros.items())),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes() or None
    except OSError:
        return None


def _write(path: Path, cubin: bytes) -> None:
    """Write a file so that other processes see all of it or nothing; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(cubin)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
    except OSError:
        pass


def _program(name: str, text: str, macros: Mapping[str, int], architecture: str, **options: str) -> Any:
    from cuda.core import Program, ProgramOptions

    defines = [(key, str(value)) for key, value in sorted(macros.items())]
    options = ProgramOptions(name=name, arch=architecture, std="c++17", define_macro=defines, **options)
    return Program(text, "c++", options)


def _nvrtc(name: str, text: str, macros: Mapping[str, int], architecture: str) -> bytes:
    try:
        return bytes(_program(name, text, macros, architecture).compile("cubin").code)
    except Exception as error:
        raise CompileError(f"NVRTC could not compile {name} for {architecture} with {dict(macros)}: {error}") from error


def compile_log(name: str, macros: Mapping[str, int], architecture: str) -> str:
    """Compile a kernel file, past all caches, and return ptxas's report of registers and spills.

    Args:
        name: File in ``kernels/cuda``.
        macros: The specialisation.
        architecture: e.g. ``"sm_90"``.
    """
    log = io.StringIO()
    _program(name, source(name), macros, architecture, ptxas_options="-v").compile("cubin", logs=log)
    return log.getvalue()


def compile_cubin(name: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """Return the cubin of a kernel file for a specialisation.

    Args:
        name: File in ``kernels/cuda``.
        macros: The specialisation: preprocessor macros.
        architecture: e.g. ``"sm_90"``.

    Returns:
        The binary, from memory, from the cache on disk, or freshly compiled.

    Raises:
        CompileError: NVRTC rejects it; the message holds its log.
    """
    text = source(name)
    key = _key(text, macros, architecture)
    with _lock:
        cubin = _cubins.get(key)
        if cubin is None:
            path = cache_directory() / f"{name.removesuffix('.cu')}-{architecture}-{key[:32]}.cubin"
            cubin = _read(path)
            if cubin is None:
                cubin = _nvrtc(name, text, macros, architecture)
                _write(path, cubin)
            _cubins[key] = cubin
    return cubin
