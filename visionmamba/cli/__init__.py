"""The ``visionmamba`` command.

Each command is a module of this package with a function of the same name (a trailing underscore, as in ``list_.py``,
keeps a builtin's name free). Adding a file adds a command. Only the command that was asked for is imported; ``--help``
shows the others by the first sentence of their function's docstring, read without importing them.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from ._common import CommandError, one_line

__all__ = ["CommandError", "commands", "main"]


def commands() -> dict[str, Path]:
    """Return the name of each command and the file that defines it."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return {path.stem.rstrip("_").replace("_", "-"): path for path in modules if not path.stem.startswith("_")}


def _load(name: str, path: Path) -> Callable[..., Any]:
    module = importlib.import_module(f"{__name__}.{path.stem}")
    return getattr(module, path.stem, None) or getattr(module, name.replace("-", "_"))


def _summary(name: str, path: Path) -> str:
    """Return the first sentence of a command's docstring without importing its module."""
    functions = {path.stem, name.replace("-", "_")}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            return (ast.get_docstring(node) or "").split("\n\n")[0]
    return ""


def _unloaded() -> None:
    raise AssertionError("a command that was not asked for was run")


def _version(asked: bool) -> None:
    if asked:
        from visionmamba import __version__

        typer.echo(f"visionmamba {__version__}")
        raise typer.Exit


def _callback(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Version.")):
    """Mamba vision backbones for timm, on one selective-scan core."""


def _app(arguments: Sequence[str]) -> typer.Typer:
    """Build the command line, with the code of the command that the arguments name."""
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_callback)
    for name, path in commands().items():
        if name == asked:
            app.command(name)(_load(name, path))
        else:
            app.command(name, help=_summary(name, path))(_unloaded)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ``visionmamba`` command and exit.

    Args:
        arguments: Words of the command line after the program's name; by default those of this process.

    Raises:
        SystemExit: Always: 0 after success, 1 after an error in the input, 2 after a wrong use, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _app(arguments)(arguments, prog_name="visionmamba")
    except (CommandError, ImportError, OSError) as error:  # ImportError: an optional package
        typer.echo(f"error: {one_line(error)}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:  # while a command is imported; later ones are the command's or Typer's
        sys.exit(130)
