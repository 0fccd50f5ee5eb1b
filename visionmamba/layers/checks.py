"""Checks of arguments that layers and models share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.layers import register_notrace_function

__all__ = ["check_choice", "check_input"]


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


@torch.fx.wrap
@register_notrace_function
def check_input(x: torch.Tensor, layout: str, minimum: list[int]) -> torch.Tensor:
    """Return ``x`` if its rank and sizes fit.

    Args:
        x: Input of a model.
        layout: Its expected layout, for the error.
        minimum: Smallest size of each dimension after the channels.

    Raises:
        ValueError: The rank is another, or a dimension is smaller than one patch.
    """
    if x.dim() != len(minimum) + 2:
        raise ValueError(f"x: expected {layout}, got shape {list(x.shape)}")
    for i, size in enumerate(minimum):
        if x.shape[i + 2] < size:
            raise ValueError(f"x: expected {layout} of at least {minimum} after the channels, got {list(x.shape)}")
    return x
