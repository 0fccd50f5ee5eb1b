"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ._text import one_line

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["replacing", "write_safetensors"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, and rename it to the path if the block succeeds.

    Whoever may read the folder's new files may read this one; some writers make files for their owner alone.

    Raises:
        OSError: There is something else than a file by that name, such as a device, which would be replaced.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "expected a file to write", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk's error does not say it
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and words about them as safetensors.

    Args:
        path: Where to.
        tensors: The tensors by name.
        metadata: The words by key.

    Raises:
        OSError: The file could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"{path} could not be written ({one_line(error)})") from error


def _umask() -> int:
    mask = os.umask(0)  # there is no other way to ask
    os.umask(mask)
    return mask
