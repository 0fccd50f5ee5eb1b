"""``torch.jit.trace`` for operators whose grid may be symbolic."""

from __future__ import annotations

import torch

__all__ = ["traceable_overload"]


def traceable_overload(name: str, schema_arguments: str, returns: str = "(Tensor, Tensor)") -> torch._ops.OpOverload:
    """Give ``visionmamba::<name>`` an overload ``traced`` whose grid is ``int[]``.

    ``torch.compile`` and ``torch.export`` want ``SymInt[]``, so that the image size may stay symbolic; the tracer
    behind ``torch.jit.trace`` (and so behind fvcore's FLOP counter) fails on it. The overload has the same name in a
    traced graph, and is the same op.

    Args:
        name: The operator, already registered.
        schema_arguments: Its arguments' schema.
        returns: Its results' schema.
    """
    operator = getattr(torch.ops.visionmamba, name).default
    schema = schema_arguments.replace("SymInt[] grid", "int[] grid")
    torch.library.define(f"visionmamba::{name}.traced", f"({schema}) -> {returns}")
    torch.library.impl(
        f"visionmamba::{name}.traced", "CompositeImplicitAutograd", lambda *arguments: operator(*arguments)
    )
    return getattr(torch.ops.visionmamba, name).traced
