"""Comparisons that operators' tests share: with a float64 reference, and of a transformed block with the block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

import pytest
import torch

Results = Mapping[str, torch.Tensor]


def largest_errors(actual: Results, exact: Results) -> dict[str, float]:
    """Return the largest absolute difference of each result."""
    return {name: float((actual[name] - x).abs().max()) if x.numel() else 0.0 for name, x in exact.items()}


def assert_within_rounding(
    actual: Results,
    exact: Results,
    float32_errors: Mapping[str, float],
    dtype: torch.dtype,
    activations: Collection[str],
) -> None:
    """Compare results with the reference.

    In float32, four times the reference's own float32 error and four units in the last place of the largest value are
    allowed; activations in half precision may be off by one rounding of each value besides.

    Args:
        actual: Results of an implementation.
        exact: The reference's results in float64.
        float32_errors: How far the reference in float32 is from them.
        dtype: Dtype of the activations.
        activations: Results that come in that dtype; others come in float32.
    """
    assert actual.keys() == exact.keys()
    for name, x in exact.items():
        value = actual[name].cpu()
        expected_dtype = dtype if name in activations else torch.float32
        assert (value.shape, value.dtype) == (x.shape, expected_dtype), f"{name}: {value.shape}, {value.dtype}"
        if not x.numel():
            continue
        allowed = 4 * float32_errors[name] + 4 * torch.finfo(torch.float32).eps * float(x.abs().max())
        error = (value.double() - x).abs()
        if value.dtype != torch.float32:
            error = error - x.abs() * torch.finfo(dtype).eps / 2 - torch.finfo(dtype).smallest_normal
        assert float(error.max()) <= allowed, f"{name}: off by {float(error.max())}, at most {allowed} expected"


def assert_same_training_step(
    function: Callable[[torch.Tensor], torch.Tensor], block: torch.nn.Module, x: torch.Tensor
) -> None:
    """Compare the output of a transformed block, and its parameters' gradients, with the block's own."""
    found = []
    for run in (function, block):
        block.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y, *(parameter.grad for parameter in block.parameters())])
    for actual, eager in zip(*found, strict=True):
        torch.testing.assert_close(actual, eager)


@contextlib.contextmanager
def skip_if_unsupported() -> Iterator[None]:
    """Skip a float64 test on a backend that says it does not take float64."""
    try:
        yield
    except RuntimeError as error:
        if "float64" in str(error) and "was asked for but cannot run this call" in str(error):
            pytest.skip(str(error))
        raise
