"""Words for errors: messages on one line, and names near the one that was given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["near_names", "one_line"]


def one_line(error: BaseException | str, limit: int = 600) -> str:
    """Return an error's message on one line.

    Args:
        error: The exception, or its message.
        limit: Number of characters after which the rest is cut.

    Returns:
        The message with runs of white space replaced by one space; the exception's class if it has no message.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def near_names(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """Return the end of an error about an unknown name.

    Args:
        name: The name that was given.
        names: Names that are known.
        otherwise: What to say if none of them is near.

    Returns:
        Known names that are near it, as a question; with a semicolon before.
    """
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else otherwise
    return f"; {hint}" if hint else ""
