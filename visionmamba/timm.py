"""Run timm's own scripts with this package's models: ``python -m visionmamba.timm SCRIPT [ARGUMENTS]``.

timm's ``train.py``, ``validate.py``, ``benchmark.py``, ``onnx_export.py``, ... are in its repository, not in its wheel,
and know no plugins. This imports the package, which registers its models, and then runs the script as if it had been
called itself; so ``torchrun -m visionmamba.timm train.py ...`` works too.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import visionmamba  # noqa: F401  (registers the models; ``import timm`` in the script is timm itself)

__all__ = ["main"]

_USAGE = "usage: python -m visionmamba.timm SCRIPT [ARGUMENTS], with a script of timm's repository such as train.py"


def main(arguments: Sequence[str]) -> None:
    """Run a script.

    Args:
        arguments: The script's path and its arguments.

    Raises:
        SystemExit: There is no such script, or the script exits.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        raise SystemExit(_USAGE)
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"error: no such script: {script}; {_USAGE}")
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.resolve().parent))  # the script's own neighbours, as python does
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
