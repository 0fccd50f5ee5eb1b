"""Checks of arguments that layers and models share."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["check_choice"]


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return an argument's value if it is one of the choices.

    Args:
        name: The argument's name.
        value: What was given.
        choices: What may be given.

    Raises:
        ValueError: It is not; the message names the argument and the choices.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
