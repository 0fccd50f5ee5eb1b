"""A stand-in for the CUDA launcher that runs the kernels on the CPU through ``simt.h``: slow, and needs a compiler.

With checks (:func:`checked`) every launch is run under several schedules and must leave the same bits under each, and
its accesses to memory are looked at one by one: see kernels/README.md, "Testing without a GPU".
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import itertools
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from filelock import FileLock

from visionmamba.ops._numba import cache_directory

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
_KERNEL = re.compile(r"(\w+)\(const __grid_constant__ (\w+) p\)")
_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
_SHARED = re.compile(r"(?:__align__\((\d+)\) )?__shared__ (\w+) (\w+\[[^;]*);")
_ARRAY = re.compile(r"(\w+)((?:\[[^\]]*\])+)")
_OPTIONS = ("-std=c++17", "-w", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-fvisibility=hidden")
_BUILDS = {
    "plain": ("-O1",),
    "checked": (
        "-O1", "-g1", "-fsanitize=thread", "-ftrivial-auto-var-init=pattern",
        "-fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero,shift",
    ),
    "address": ("-O1", "-g1", "-fsanitize=address", "-ftrivial-auto-var-init=pattern"),
}  # fmt: skip
_ORDERS = ("in_turn", "reversed", "shuffled", "warps_by_rank", "threads_by_rank")


@dataclass(frozen=True)
class Schedule:
    """In which order threads, blocks and copies come.

    Args:
        order: How a block's threads take turns: in turn, in reverse, or in another order each round, each until it must
            wait for others; or by rank, so that the last warp or thread is left behind as far as barriers allow.
        seed: Of the order.
        copies_at_once: Whether copies to shared memory are made when they begin, or when they are waited for.
        blocks: The order of blocks: ``"in_turn"``, ``"reversed"`` or ``"shuffled"``.
    """

    order: str = "in_turn"
    seed: int = 0
    copies_at_once: bool = False
    blocks: str = "in_turn"

    def arrange(self, blocks: range) -> list[int]:
        arranged = list(reversed(blocks) if self.blocks == "reversed" else blocks)
        if self.blocks == "shuffled":
            random.Random(self.seed).shuffle(arranged)
        return arranged


SCHEDULES = (
    Schedule(),
    Schedule("reversed", 0, True, "reversed"),
    Schedule("shuffled", 1, False, "shuffled"),
    Schedule("warps_by_rank", 2, True, "reversed"),
    Schedule("warps_by_rank", 3),
    Schedule("threads_by_rank", 4, True, "shuffled"),
)


@dataclass(frozen=True)
class Checks:
    """What is checked of every launch.

    Args:
        schedules: Those to run it under.
        watch: Whether to look at each access, too.
        poison: Whether what is allocated is NaN until it is written.
        folder: Where the kernels' files are, if not in the package.
    """

    schedules: tuple[Schedule, ...] = SCHEDULES
    watch: bool = True
    poison: bool = True
    folder: Path | None = None


_checks: Checks | None = None


@contextlib.contextmanager
def checked(checks: Checks | None = None) -> Iterator[None]:
    """Check every launch of the block."""
    global _checks
    before, deterministic = _checks, torch.are_deterministic_algorithms_enabled()
    _checks = checks or Checks()
    torch.use_deterministic_algorithms(_checks.poison)  # torch.empty fills what it returns then
    try:
        yield
    finally:
        _checks = before
        torch.use_deterministic_algorithms(deterministic)


def _text(folder: Path | None, name: str) -> str:
    """Return a kernel file with its includes inlined, each line known by its file and number."""

    def inline(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 2
        return f'#line 1 "{match[1]}"\n{(folder / match[1]).read_text()}\n#line {line} "{name}"\n'

    folder = folder or resources.files("visionmamba.kernels.cuda")
    text = (folder / name).read_text()
    return f'#line 1 "{name}"\n' + _INCLUDE.sub(inline, text)


def _code(folder: Path | None, name: str) -> str:
    text = _text(folder, name)
    wrappers = "".join(
        f'extern "C" __attribute__((visibility("default"))) void emulate_{kernel}(const void* p) '
        f"{{ {kernel}(*(const {struct}*)p); }}\n"
        for kernel, struct in _KERNEL.findall(text)
    )
    numbers = itertools.count()

    def arrays(match: re.Match[str]) -> str:
        alignment, kind, names = match.groups()
        found = _ARRAY.findall(names)
        return " ".join(f"SHARED_ARRAY({next(numbers)}, {alignment or 1}, {kind}, {n}, {sizes})" for n, sizes in found)

    text = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"#define \2 ((\1*)simt::dynamic_shared())", text)
    text = _SHARED.sub(arrays, text)
    return f'#include "{HERE / "simt.h"}"\nnamespace {{\n{text}\n{wrappers}}}\n'


def _stored(name: str, key: str, write) -> Path:
    """Return a file of the cache, written by one process at a time, and found under its name only when it is whole."""
    folder = cache_directory() / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (hashlib.sha256(key.encode()).hexdigest()[:24] + name)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                written = Path(temporary) / path.name
                write(written)
                written.replace(path)
    return path


def _run(*command) -> None:
    subprocess.run([COMPILER, *_OPTIONS, *map(str, command)], check=True)


@cache
def _runtime() -> Path:
    files = [HERE / name for name in ("simt.cpp", "simt_checks.h")]
    text = "".join(file.read_text() for file in files)
    return _stored(".o", text, lambda path: _run("-O2", "-c", files[0], "-o", path))


@cache
def _build(folder: Path | None, file: str, macros: tuple, build: str) -> ctypes.CDLL:
    code, runtime = _code(folder, file), _runtime()
    options = (*_BUILDS[build], *(f"-D{key}={value}" for key, value in macros))

    def write(path: Path) -> None:
        unit = path.with_suffix(".cpp")
        unit.write_text(code)
        _run(*options, "-c", unit, "-o", path.with_suffix(".o"))
        sanitizer = ("-fsanitize=address",) if build == "address" else ()  # the others' runtime is ours
        _run("-shared", *sanitizer, path.with_suffix(".o"), runtime, "-o", path)

    key = str((code, (HERE / "simt.h").read_text(), options, runtime.name))
    library = ctypes.CDLL(str(_stored(".so", key, write)))
    library.simt_run.restype = ctypes.c_char_p
    return library


class _Schedule(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("order", "seed", "copies_at_once", "checks")]


def _emulate(library, name, blocks, threads, packed: bytes, shared_bytes, schedule: Schedule, regions=None) -> str:
    """Run a kernel; return what is wrong with it, if regions of memory are given that it may touch."""
    kernel, order = getattr(library, f"emulate_{name}"), (ctypes.c_uint32 * len(blocks))(*blocks)
    bounds = [place for region in regions or () for place in region]
    how = _Schedule(_ORDERS.index(schedule.order), schedule.seed, schedule.copies_at_once, regions is not None)
    return library.simt_run(
        kernel, ctypes.create_string_buffer(packed), len(packed), order, len(order), threads, shared_bytes,
        ctypes.byref(how), (ctypes.c_uint64 * len(bounds))(*bounds), len(bounds) // 2,
    ).decode()  # fmt: skip


def outcome(function, tensors, cotangent=lambda x: x) -> list[torch.Tensor]:
    """Return what a function of leaves returns and its gradients; ``cotangent`` may move their cotangents."""
    results = [x for x in function(*tensors) if x.requires_grad]
    cotangents = [cotangent(torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype)) for x in results]
    return [*results, *torch.autograd.grad(results, tensors, cotangents)]


def _regions(wide: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the memory of the tensors that the arguments point into: first and last address of each."""
    storages = {}
    for x in gc.get_objects():
        if type(x) is torch.Tensor and x.device.type == "cpu" and x.layout is torch.strided:
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    found = {(begin, begin + size) for begin, size in storages.items() if any(begin <= w < begin + size for w in wide)}
    return sorted(found)


def _with_places(faults: str, library: ctypes.CDLL) -> str:
    """Replace addresses in the code by files and lines, the innermost call first."""

    def found(match: re.Match[str]) -> str:
        tool = shutil.which("addr2line")
        if tool is None:
            return match[0]
        command = [tool, "-i", "-s", "-e", library._name, match[1]]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        return " < ".join(line.split(" ")[0] for line in lines[:3] if line)

    return re.sub(r"<\+(\w+)>", found, faults)


class EmulatedLauncher:
    """Same interface as :class:`visionmamba.ops.cuda_runtime.Launcher`."""

    architecture = "sm_90"

    def __init__(self, multiprocessors: int = 1, shared_bytes: int = 232448):
        self.multiprocessors, self.shared_bytes = multiprocessors, shared_bytes

    def resident_blocks(self, file, name, macros, threads):
        return 4

    def blocks_to_run(self, blocks: int) -> range:
        return range(blocks)

    def run(self, file, name, macros: Mapping[str, int], blocks, threads, arguments, shared_bytes=0):
        build = "address" if os.environ.get("VISIONMAMBA_EMULATE") == "address" else "checked" if _checks else "plain"
        folder = os.environ.get("VISIONMAMBA_EMULATED_KERNELS")
        folder = Path(folder) if folder else _checks and _checks.folder
        library = _build(folder, file, tuple(sorted(macros.items())), build)
        launch = (library, name, self.blocks_to_run(blocks), threads, arguments.pack(), shared_bytes)
        if build != "checked":
            faults = _emulate(*launch, Schedule())
            assert not faults, f"{name} of {file}: {faults}"
            return
        self._check(f"{name} of {file}", *launch, _regions(arguments.wide))
        assert library.simt_static_bytes() + shared_bytes <= self.shared_bytes

    def _check(self, what, library, name, blocks, threads, packed, shared_bytes, regions) -> None:
        """Run a launch under each schedule, from the same memory to the same memory."""

        def memory() -> list[bytes]:
            return [ctypes.string_at(begin, end - begin) for begin, end in regions]

        several, watched = len(_checks.schedules) > 1, regions if _checks.watch else None
        before, after = memory() if several else [], None
        for schedule in _checks.schedules:
            for (begin, end), content in zip(regions, before, strict=several):
                ctypes.memmove(begin, content, end - begin)
            order = schedule.arrange(blocks)
            faults = _emulate(library, name, order, threads, packed, shared_bytes, schedule, watched)
            assert not faults, f"{what}, {schedule}:\n{_with_places(faults, library)}"
            if not several:
                return
            after = after or memory()
            assert memory() == after, f"{what}: {schedule} leaves other bits than {_checks.schedules[0]}"
