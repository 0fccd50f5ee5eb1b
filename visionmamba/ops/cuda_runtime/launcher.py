"""Launch compiled kernels on torch's current stream. Every kernel takes one struct."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from .compiler import KernelError, available, compile_cubin

__all__ = ["Address", "Arguments", "Kernel", "Launcher", "Prepared", "launcher", "pointer", "usable", "watch_launches"]


class Address(int):
    """A tensor's address that knows the tensor: what :func:`pointer` returns where launches are watched."""

    tensor: torch.Tensor


def pointer(tensor: torch.Tensor | None) -> int:
    """Return a tensor's address, 0 for None."""
    if tensor is None:
        return 0
    if _thread.watcher is None:
        return tensor.data_ptr()
    address = Address(tensor.data_ptr())
    address.tensor = tensor
    return address


class Arguments(NamedTuple):
    """A kernel's argument struct: 8-byte fields (pointers and int64), then 4-byte ones (int32)."""

    wide: tuple[int, ...]
    narrow: tuple[int, ...]

    def pack(self) -> bytes:
        """Return the struct's bytes."""
        return _struct(len(self.wide), len(self.narrow)).pack(*self.wide, *self.narrow)

    def place(self) -> int:
        """Return the address of a list of kernel parameters, the struct alone; see :func:`_place`."""
        layout = _struct(len(self.wide), len(self.narrow))
        buffer, parameters = _place(layout.size)
        layout.pack_into(buffer, 0, *self.wide, *self.narrow)
        return parameters


class _Thread(threading.local):
    """What a thread has at hand for its launches.

    Buffers for arguments by size, the devices whose context it has entered, and who watches its launches.
    """

    def __init__(self) -> None:
        self.places: dict[int, tuple[Any, int, Any]] = {}
        self.entered: set[int] = set()
        self.watcher: Callable[[Prepared, Arguments], None] | None = None


_thread = _Thread()


@cache
def _struct(wide: int, narrow: int) -> struct.Struct:
    return struct.Struct(f"={wide}q{narrow}i" + ("4x" if narrow % 2 else ""))


def _place(size: int) -> tuple[Any, int]:
    """Return a buffer for a struct, and the address of a list of kernel parameters that is the struct alone.

    Both hold until the thread's next call: the driver copies a launch's parameters before it returns.
    """
    places = _thread.places
    if size not in places:
        buffer = ctypes.create_string_buffer(size)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        places[size] = buffer, ctypes.addressof(parameters), parameters
    return places[size][:2]


@contextlib.contextmanager
def watch_launches(watcher: Callable[[Prepared, Arguments], None]) -> Iterator[None]:
    """Call a function for each launch of this thread inside the ``with`` block; the launches take place all the same.

    Args:
        watcher: Takes the launch, and its arguments, whose pointers are each an :class:`Address`.
    """
    before, _thread.watcher = _thread.watcher, watcher
    try:
        yield
    finally:
        _thread.watcher = before


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


_REFUSED = (1, 200, 209, 218, 701)
"""CUresults of launches that the driver refuses (value, image, binary, PTX, resources): nothing ran."""


class Kernel:
    """A loaded kernel of one specialisation.

    Args:
        handle: The driver's function.
        library: Keeps the binary loaded.
    """

    def __init__(self, handle: Any, library: Any) -> None:
        self._handle, self._library = handle, library
        self._resident: dict[int, int] = {}

    def launch(self, blocks: int, threads: int, parameters: int, stream: int, shared_bytes: int = 0) -> None:
        """Launch the kernel.

        Args:
            blocks: Blocks of the one-dimensional grid.
            threads: Threads a block.
            parameters: Address of the list of parameters.
            stream: The stream's address.
            shared_bytes: Dynamic shared memory.
        """
        (status,) = _driver().cuLaunchKernel(
            self._handle, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, 0
        )
        if int(status) != 0:
            error = KernelError if int(status) in _REFUSED else RuntimeError
            raise error(f"kernel launch failed: {status!s} (blocks {blocks}, threads {threads})")

    def resident_blocks(self, threads: int) -> int:
        """Return how many blocks of that many threads a multiprocessor runs at a time."""
        if threads not in self._resident:
            driver = _driver()
            status, blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._handle, threads, 0)
            _check(status, "asking for a kernel's occupancy")
            self._resident[threads] = max(1, blocks)
        return self._resident[threads]


class Prepared:
    """A launch that lacks the addresses of its tensors alone.

    Args:
        launcher: The device.
        kernel: The kernel.
        blocks: Blocks of the grid.
        threads: Threads a block.
        arguments: The struct: all fields up to the last pointer are given anew at each launch.
        shared_bytes: Dynamic shared memory.
    """

    def __init__(
        self, launcher: Launcher, kernel: Kernel, blocks: int, threads: int, arguments: Arguments, shared_bytes: int
    ) -> None:
        self._launcher, self._kernel, self._sizes = launcher, kernel, (blocks, threads, shared_bytes)
        self.open = max((i + 1 for i, field in enumerate(arguments.wide) if isinstance(field, Address)), default=0)
        self._fixed = arguments.pack()[8 * self.open :]
        self._layout = struct.Struct(f"={self.open}q{len(self._fixed)}s")

    def __call__(self, *fields: int) -> None:
        """Launch with these first ``open`` fields."""
        buffer, parameters = _place(self._layout.size)
        self._layout.pack_into(buffer, 0, *fields, self._fixed)
        self._launcher.start(self._kernel, *self._sizes, parameters)


class Launcher:
    """Kernels of one device.

    Args:
        device: A CUDA device.

    Raises:
        KernelError: Its methods raise it where a kernel does not compile, load or start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.multiprocessors: int = properties.multi_processor_count
        self.shared_bytes: int = properties.shared_memory_per_block_optin
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self._context = _primary_context(self.device.index)
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._lock = threading.Lock()

    def kernel(self, file: str, name: str, macros: Mapping[str, int], shared_bytes: int = 0) -> Kernel:
        """Return a kernel, compiled and loaded if need be.

        Args:
            file: File in ``kernels/cuda``.
            name: The kernel's name in it.
            macros: The specialisation.
            shared_bytes: Most dynamic shared memory that a launch will ask for.
        """
        key = (file, name, *macros.items(), shared_bytes)
        kernel = self._kernels.get(key)
        if kernel is None:
            with self._lock, self._current():
                kernel = self._kernels[key] = self._load(file, name, macros, shared_bytes)
        return kernel

    def _load(self, file: str, name: str, macros: Mapping[str, int], shared_bytes: int) -> Kernel:
        driver = _driver()
        cubin = compile_cubin(file, macros, self.architecture)
        status, library = driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
        _check(status, f"loading {file}")
        status, kernel = driver.cuLibraryGetKernel(library, name.encode())
        _check(status, f"finding {name} in {file}")
        if shared_bytes:  # beyond 48 KiB together with the static shared memory, this must be asked for
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            status, device = driver.cuDeviceGet(self.device.index)
            (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel, device)
            _check(status, f"setting the shared memory of {name}")
        status, function = driver.cuKernelGetFunction(kernel)
        _check(status, f"binding {name} to the device's context")
        return Kernel(function, library)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make the device and its context current: a thread of autograd's may not have entered it yet.

        Once a thread has, PyTorch switches to the context whenever it switches to the device.
        """
        driver, here = _driver(), torch.cuda.current_device() == self.device.index
        with contextlib.nullcontext() if here else torch.cuda.device(self.device):
            _, current = driver.cuCtxGetCurrent()
            if int(current) != int(self._context):
                _check(driver.cuCtxSetCurrent(self._context)[0], "entering the device's context")
            if here:
                _thread.entered.add(self.device.index)
            yield

    def stream(self) -> int:
        """Return the address of torch's current stream on the device."""
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def resident_blocks(self, file: str, name: str, macros: Mapping[str, int], threads: int) -> int:
        """Return how many blocks of a kernel (without dynamic shared memory) a multiprocessor runs at a time."""
        with self._current():
            return self.kernel(file, name, macros).resident_blocks(threads)

    def run(
        self,
        file: str,
        name: str,
        macros: Mapping[str, int],
        blocks: int,
        threads: int,
        arguments: Arguments,
        shared_bytes: int = 0,
    ) -> None:
        """Launch a kernel on torch's current stream; compile it first if need be."""
        if not blocks:
            return
        kernel = self.kernel(file, name, macros, shared_bytes)
        if _thread.watcher is not None:
            _thread.watcher(Prepared(self, kernel, blocks, threads, arguments, shared_bytes), arguments)
        self.start(kernel, blocks, threads, shared_bytes, arguments.place())

    def start(self, kernel: Kernel, blocks: int, threads: int, shared_bytes: int, parameters: int) -> None:
        """Launch a kernel on torch's current stream; ``parameters``: the address of their list."""
        index = self.device.index
        if index in _thread.entered and torch._C._cuda_getDevice() == index:
            kernel.launch(blocks, threads, parameters, self.stream(), shared_bytes)
            return
        with self._current():
            kernel.launch(blocks, threads, parameters, self.stream(), shared_bytes)


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise KernelError(f"{what} failed: {status!s}")


def _primary_context(index: int) -> Any:
    """Return the context that torch uses on a device."""
    driver = _driver()
    torch.cuda.current_stream(index)  # torch sets its context up
    status, device = driver.cuDeviceGet(index)
    _check(status, f"finding device {index}")
    status, context = driver.cuDevicePrimaryCtxRetain(device)
    _check(status, f"taking the context of device {index}")
    return context


@cache
def _launcher(index: int) -> Launcher:
    return Launcher(torch.device("cuda", index))


def launcher(device: torch.device) -> Launcher:
    """Return the launcher of a CUDA device."""
    return _launcher(torch.cuda.current_device() if device.index is None else device.index)


def usable() -> str | None:
    """Return None if CUDA kernels can run on this machine, else the reason why not: the operators' ``probe``."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 or newer"
    return available()
