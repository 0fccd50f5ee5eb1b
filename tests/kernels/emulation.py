"""A stand-in for the CUDA launcher that runs the kernels on the CPU through ``simt.h``: slow, and needs a compiler."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from visionmamba.ops.cuda_runtime import source

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
_KERNEL = re.compile(r"(\w+)\(const __grid_constant__ (\w+) p\)")


@cache
def _build(file: str, macros: tuple) -> ctypes.CDLL:
    text = source(file)
    wrappers = "\n".join(
        f'extern "C" void emulate_{name}(const void* a, unsigned blocks, unsigned threads) '
        f"{{ {struct} p; memcpy((void*)&p, a, sizeof p); simt::run(blocks, threads, [&] {{ {name}(p); }}); }}"
        for name, struct in _KERNEL.findall(text)
    )
    code = f'#include "{HERE / "simt.h"}"\n{text}\n{wrappers}\n'
    code = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"static \1 \2[1 << 17];", code)
    defines = [f"-D{key}={value}" for key, value in macros]
    folder = Path(tempfile.gettempdir()) / "visionmamba-simt"
    folder.mkdir(exist_ok=True)
    library = (
        folder / f"{hashlib.sha256((code + str(defines) + (HERE / 'simt.h').read_text()).encode()).hexdigest()[:24]}.so"
    )
    if not library.exists():
        unit = library.with_suffix(".cpp")
        unit.write_text(code)
        command = [
            COMPILER,
            "-std=c++17",
            "-O1",
            "-w",
            "-fPIC",
            "-shared",
            "-fno-strict-aliasing",
            "-fno-gnu-unique",
            "-fvisibility-inlines-hidden",
            *defines,
        ]
        subprocess.run([*command, str(unit), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class EmulatedLauncher:
    """Same interface as :class:`visionmamba.ops.cuda_runtime.Launcher`."""

    architecture = "sm_90"

    def __init__(self, multiprocessors: int = 1, shared_bytes: int = 232448):
        self.multiprocessors, self.shared_bytes = multiprocessors, shared_bytes

    def resident_blocks(self, file, name, macros, threads):
        return 4

    def run(self, file, name, macros, blocks, threads, arguments, shared_bytes=0):
        library = _build(file, tuple(sorted(macros.items())))
        packed = ctypes.create_string_buffer(arguments.pack())
        getattr(library, f"emulate_{name}")(packed, ctypes.c_uint(blocks), ctypes.c_uint(threads))
