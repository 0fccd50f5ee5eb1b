"""Class tokens inside a sequence of patch tokens: at its head, in its middle, or at both ends.

``position`` is ``"head"`` (index 0), ``"middle"`` (index L // 2 of L patch tokens), ``"double"`` (one token at each
end; they are averaged where one is wanted) or empty for a sequence without class tokens.
"""

from __future__ import annotations

import torch

__all__ = [
    "CLASS_TOKEN_POSITIONS",
    "class_token_indices",
    "insert_class_token",
    "remove_class_token",
    "take_class_token",
]

CLASS_TOKEN_POSITIONS = ("", "head", "middle", "double")


def class_token_indices(position: str, num_patches: int) -> list[int]:
    """Return where the class tokens are in the sequence of patch and class tokens.

    Args:
        position: See the module's description.
        num_patches: Patch tokens, without the class tokens.
    """
    if position == "head":
        return [0]
    if position == "middle":
        return [num_patches // 2]
    if position == "double":
        return [0, num_patches + 1]
    return []


def insert_class_token(x: torch.Tensor, token: torch.Tensor, position: str) -> torch.Tensor:
    """Insert class tokens.

    Args:
        x: Patch tokens, ``(B, L, C)``.
        token: ``(1, 1, C)``; ``(1, 2, C)``, head and tail, for ``"double"``.
        position: See the module's description.

    Returns:
        ``(B, L + 1, C)``, or ``(B, L + 2, C)``.
    """
    token = token.expand(x.shape[0], -1, -1).to(x.dtype)
    if position == "middle":
        middle = x.shape[1] // 2
        return torch.cat([x[:, :middle], token, x[:, middle:]], dim=1)
    if position == "double":
        return torch.cat([token[:, :1], x, token[:, 1:]], dim=1)
    return torch.cat([token, x], dim=1)


def remove_class_token(x: torch.Tensor, position: str) -> torch.Tensor:
    """Return the patch tokens ``(B, L, C)`` of a sequence with class tokens."""
    if position == "head":
        return x[:, 1:]
    if position == "middle":
        middle = (x.shape[1] - 1) // 2
        return torch.cat([x[:, :middle], x[:, middle + 1 :]], dim=1)
    if position == "double":
        return x[:, 1:-1]
    return x


def take_class_token(x: torch.Tensor, position: str) -> torch.Tensor:
    """Return the class token ``(B, C)`` of a sequence; the mean of both for ``"double"``."""
    if position == "middle":
        return x[:, (x.shape[1] - 1) // 2]
    if position == "double":
        return (x[:, 0] + x[:, -1]) / 2
    return x[:, 0]
