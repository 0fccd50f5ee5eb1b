"""Arguments that several commands take: models by name or pattern, and sizes."""

from __future__ import annotations

from collections.abc import Sequence

from ._common import CommandError, check_model_name

__all__ = ["parse_size", "resolve_models"]


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Return (height, width) from ``224`` or ``160x224``.

    Args:
        text: What the user gave.
        option: The option to name in the error.

    Raises:
        CommandError: It is not a size.
    """
    try:
        sizes = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 2 or min(sizes, default=0) < 1:
        raise CommandError(f"{option}: expected a size such as 224 or 160x224, got {text!r}")
    return sizes[0], sizes[-1]


def resolve_models(patterns: Sequence[str], timm_models: bool = True) -> list[str]:
    """Return models by name or shell pattern, in the order given, each once.

    Args:
        patterns: Names of any timm model, or patterns over the zoo's names such as ``vmamba_*``.
        timm_models: Take names of timm's own models as well.

    Raises:
        CommandError: A name is not known, or no model of the zoo fits a pattern.
    """
    import timm

    from visionmamba.zoo import model_names

    names: list[str] = []
    for pattern in patterns:
        if set(pattern) & set("*?["):
            found = model_names(pattern)
            if not found:
                raise CommandError(f"no model fits {pattern!r}; 'visionmamba list' shows all models")
            names += found
        else:
            known = timm_models and timm.is_model(pattern.split(".")[0])
            names.append(pattern if known else check_model_name(pattern, model_names()))
    return list(dict.fromkeys(names))
