"""What the commands share: one-line errors, output for people and for scripts, and names that resolve."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from visionmamba._text import near_names, one_line

__all__ = [
    "CommandError",
    "JsonOption",
    "check_folder",
    "check_model_name",
    "check_writable",
    "console",
    "measurements_stay",
    "one_line",
    "print_json",
    "progress",
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of text for people.")]


class CommandError(Exception):
    """What the user gave cannot be used; shown as one line, and the command exits with status 1."""


def console(stderr: bool = False) -> Console:
    """Return a console that never cuts or wraps what is piped into a file or another program."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 240, highlight=False)


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def progress(**kwargs: Any) -> Progress:
    """Return a progress bar on standard error, so that standard output stays clean for pipes and ``--json``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        **kwargs,
    )


@contextlib.contextmanager
def measurements_stay(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C that what was measured is kept.

    Args:
        folder: Where it is.

    Raises:
        typer.Exit: After Ctrl-C, with status 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        note = f"interrupted: {folder} keeps what was measured; the same command again goes on from there"
        typer.echo(note, err=True)
        raise typer.Exit(130) from None


def check_model_name(name: str, names: Iterable[str]) -> str:
    """Return a model's name if it is known.

    Args:
        name: A name, with or without the tag of its weights (``vim_tiny_patch16_224.in1k``).
        names: Names that are known, without tags.

    Raises:
        CommandError: It is not known; the message gives near names.
    """
    names = list(names)
    if name.split(".")[0] in names:
        return name
    hint = near_names(name.split(".")[0], names, "'visionmamba list' shows all models")
    raise CommandError(f"unknown model {name!r}{hint}")


def check_writable(path: Path, what: str = "--out") -> Path:
    """Make sure that a file can be written, before any work is done for it.

    Args:
        path: The file; its folder is created if it does not exist.
        what: The argument to name in the error.

    Returns:
        The path.

    Raises:
        CommandError: The file or its folder cannot be written.
    """
    if path.exists() and not path.is_file():
        raise CommandError(f"{what}: {path} is a {'folder' if path.is_dir() else 'device'}, expected a file")
    check_folder(path.parent, what)
    if path.exists() and not os.access(path, os.W_OK):
        raise CommandError(f"{what}: no permission to write {path}")
    return path


def check_folder(folder: Path, what: str = "--out") -> Path:
    """Make sure that files can be written into a folder, before any work is done for them.

    Args:
        folder: The folder; it is created if it does not exist.
        what: The argument to name in the error.

    Returns:
        The folder.

    Raises:
        CommandError: It is not a folder, or cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise CommandError(f"{what}: cannot write to the folder {folder}: {error.strerror}") from error
