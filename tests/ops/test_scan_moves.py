import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionmamba.ops.scan_moves import scan_moves
from visionmamba.ops.scan_path import scan_path

SNAKES = "snake_h,snake_h_flip,snake_v,snake_v_flip"


def codes(path, grid, in_step_order=True):
    return scan_moves(torch.zeros(1), path, list(grid), in_step_order).argmax(-1).T.tolist()


def test_published_example():
    assert codes("snake_h,snake_h_flip", (3, 4)) == [
        [0, 1, 1, 1, 4, 2, 2, 2, 4, 1, 1, 1],
        [0, 2, 2, 2, 3, 1, 1, 1, 3, 2, 2, 2],
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_moves_lead_along_the_path(rows, columns):
    step = {1: (0, 1), 2: (0, -1), 3: (-1, 0), 4: (1, 0)}
    table = scan_path(SNAKES, (rows, columns))
    for k, direction in enumerate(codes(SNAKES, (rows, columns))):
        place = table.coordinates(k)
        assert direction[0] == 0
        for before, code, after in zip(place, direction[1:], place[1:], strict=False):
            assert tuple(before + np.array(step[code])) == tuple(after)


def test_by_token_is_the_same_table_in_raster_order():
    grid = (3, 5)
    steps, tokens = codes(SNAKES, grid), codes(SNAKES, grid, in_step_order=False)
    for k, order in enumerate(scan_path(SNAKES, grid).order):
        assert [tokens[k][token] for token in order] == steps[k]


def test_the_table_is_not_shared_between_callers():
    first = scan_moves(torch.zeros(1), SNAKES, [2, 2])
    first.zero_()
    assert scan_moves(torch.zeros(1), SNAKES, [2, 2]).sum() == 16


@pytest.mark.parametrize(("path", "grid"), [("h", (3, 3)), ("w2", (3, 3)), ("h", (9,)), ("sub_200", (4, 4))])
def test_paths_that_jump_are_refused(path, grid):
    with pytest.raises(ValueError, match="path"):
        codes(path, grid)


def test_fake_agrees():
    torch.library.opcheck(
        torch.ops.visionmamba.scan_moves.default, (torch.zeros(2), SNAKES, [3, 4], True), test_utils="test_faketensor"
    )
