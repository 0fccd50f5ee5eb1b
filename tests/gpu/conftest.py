"""Each test here sees kernels cut as it asks: plans of earlier ones are forgotten."""

import pytest

from visionmamba.ops._plan import forget_plans


@pytest.fixture(autouse=True)
def _no_plans():
    forget_plans()
    yield
    forget_plans()
