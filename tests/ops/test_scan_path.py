"""ScanPath: every direction of the vocabulary against its definition, by hand and by property."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionmamba.ops import padded_grid, scan_path
from visionmamba.ops.scan_path import register_direction, scan_order

AXIS_ORDERS = ["".join(axes) for rank in (2, 3) for axes in itertools.permutations("thw"[-rank:])]
PLAIN = ["h", "v", "snake_h", "snake_v", "hw", "wh"]
WINDOWS = ["w1", "w2", "w3", "w7"]
SUB_GRIDS = [
    f"sub{transposed}_{s}{y}{x}" for transposed in ("", "T") for s in (1, 2, 3) for y in range(s) for x in range(s)
]

grids = st.tuples(st.integers(1, 40), st.integers(1, 40))
directions = st.sampled_from(PLAIN + WINDOWS + SUB_GRIDS)
flips = st.sampled_from(["", "_flip"])
property_test = settings(max_examples=60, deadline=None)


def order(name, grid):
    return scan_path(name, grid).order[0].tolist()


class TestByHand:
    """Small examples written down from each family's description."""

    @pytest.mark.parametrize(
        ("name", "grid", "expected"),
        [
            ("h", (2, 3), [0, 1, 2, 3, 4, 5]),
            ("v", (2, 3), [0, 3, 1, 4, 2, 5]),
            ("h_flip", (2, 3), [5, 4, 3, 2, 1, 0]),
            ("v_flip", (2, 3), [5, 2, 4, 1, 3, 0]),
            ("snake_h", (3, 4), [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]),
            ("snake_v", (3, 4), [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3]),
            ("snake_h_flip", (3, 4), [11, 10, 9, 8, 4, 5, 6, 7, 3, 2, 1, 0]),
            ("w2", (2, 4), [0, 1, 4, 5, 2, 3, 6, 7]),
            ("w2_flip", (2, 4), [7, 6, 3, 2, 5, 4, 1, 0]),
            ("w2", (3, 3), [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]),
            ("sub_200", (4, 4), [0, 2, 8, 10]),
            ("subT_210", (4, 4), [4, 12, 6, 14]),
            ("sub_201", (4, 4), [1, 3, 9, 11]),
            ("subT_211", (4, 4), [5, 13, 7, 15]),
            ("sub_211", (3, 3), [5, 7, 13, 15]),
            ("hw", (2, 3), [0, 1, 2, 3, 4, 5]),
            ("wh", (2, 3), [0, 3, 1, 4, 2, 5]),
            ("thw", (2, 2, 2), [0, 1, 2, 3, 4, 5, 6, 7]),
            ("twh", (2, 2, 2), [0, 2, 1, 3, 4, 6, 5, 7]),
            ("wht", (2, 2, 2), [0, 4, 2, 6, 1, 5, 3, 7]),
            ("wht", (2, 1, 3), [0, 3, 1, 4, 2, 5]),
            ("h", (4,), [0, 1, 2, 3]),
            ("h", (2, 1, 2), [0, 1, 2, 3]),
        ],
    )
    def test_direction(self, name, grid, expected):
        assert order(name, grid) == expected

    def test_local_mamba_windows_on_10_by_14(self):
        assert order("w2", (10, 14))[:8] == [0, 1, 14, 15, 2, 3, 16, 17]

    def test_vmamba_cross_scan(self):
        path = scan_path("h,v,h_flip,v_flip", (2, 3))
        expected = [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
        assert path.order.tolist() == expected
        assert (path.num_directions, path.num_steps, path.num_tokens, path.grid) == (4, 6, 6, (2, 3))

    def test_middle_class_token(self):
        # four patch tokens around the class token 2; every direction meets it in the middle of its walk
        path = scan_path("h,v_flip|cls", (2, 2))
        assert path.order.tolist() == [[0, 1, 2, 3, 4], [4, 1, 2, 3, 0]]
        assert path.num_tokens == 5

    def test_shorter_directions_end_in_no_token(self):
        path = scan_path("h,w2", (1, 3))
        assert path.grid == (2, 4)
        assert path.order.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1], [0, 1, 4, 5, 2, 3, 6, 7]]
        assert path.inverse.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1], [0, 1, 4, 5, 2, 3, 6, 7]]

    def test_coordinates(self):
        assert scan_path("snake_v", (2, 2)).coordinates(0).tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]

    def test_padded_grid(self):
        assert padded_grid("h,v", (5, 9)) == (5, 9)
        assert padded_grid("w2", (5, 9)) == (6, 10)
        assert padded_grid("w2,w7_flip", (5, 9)) == (7, 14)
        assert padded_grid("sub_311,h", (5, 9)) == (6, 9)
        assert padded_grid("w2|cls", (3, 3)) == (4, 4)


def visited(name, grid):
    """The tokens of the memory grid that a direction must visit, by its definition."""
    memory = np.arange(np.prod(padded_grid(name, grid))).reshape(padded_grid(name, grid))
    base = name.removesuffix("_flip")
    if base.startswith("sub"):
        stride, row, column = (int(digit) for digit in base[-3:])
        return memory[row::stride, column::stride]
    return memory if base.startswith("w") and base[1:].isdigit() else memory[: grid[0], : grid[1]]


class TestProperties:
    @property_test
    @given(directions, flips, grids)
    def test_visits_each_of_its_tokens_once(self, name, flip, grid):
        assert sorted(order(name + flip, grid)) == sorted(visited(name, grid).ravel().tolist())

    @property_test
    @given(directions, grids)
    def test_flip_reverses_the_whole_sequence(self, name, grid):
        assert order(name + "_flip", grid) == order(name, grid)[::-1]

    @property_test
    @given(st.lists(directions, min_size=1, max_size=5), grids, st.booleans())
    def test_inverse_is_exact(self, names, grid, class_token):
        path = scan_path(",".join(names) + ("|cls" if class_token else ""), grid)
        for k in range(path.num_directions):
            steps = np.flatnonzero(path.order[k] >= 0)
            assert np.array_equal(path.inverse[k, path.order[k, steps]], steps)
            assert (path.inverse[k] >= 0).sum() == len(steps)

    @property_test
    @given(st.lists(directions, min_size=2, max_size=4), grids)
    def test_padding_of_one_direction_does_not_move_another(self, names, grid):
        path = scan_path(",".join(names), grid)
        for k, name in enumerate(names):
            assert np.array_equal(path.coordinates(k), scan_path(name, grid).coordinates(0))

    @property_test
    @given(st.sampled_from(AXIS_ORDERS), st.lists(st.integers(1, 9), min_size=3, max_size=3))
    def test_axis_orders_are_transpositions(self, axes, sizes):
        grid = tuple(sizes[: len(axes)])
        letters = "thw"[-len(axes) :]
        tokens = np.arange(np.prod(grid)).reshape(grid)
        assert order(axes, grid) == tokens.transpose([letters.index(axis) for axis in axes]).ravel().tolist()

    @property_test
    @given(st.sampled_from(["", "T"]), st.integers(1, 4), grids)
    def test_sub_grids_are_disjoint_and_complete(self, transposed, stride, grid):
        names = [f"sub{transposed}_{stride}{y}{x}" for y in range(stride) for x in range(stride)]
        path = scan_path(",".join(names), grid)
        assert path.grid == tuple(-(-side // stride) * stride for side in grid)
        assert sorted(path.order.ravel().tolist()) == list(range(path.num_tokens))

    @property_test
    @given(st.sampled_from(["h", "v"]), grids)
    def test_snakes_move_by_single_steps(self, axis, grid):
        moves = np.abs(np.diff(scan_path(f"snake_{axis}", grid).coordinates(0), axis=0))
        assert (moves.sum(axis=1) == 1).all()

    @property_test
    @given(st.sampled_from([2, 3, 7]), grids)
    def test_windows_are_contiguous(self, size, grid):
        coordinates = scan_path(f"w{size}", grid).coordinates(0)
        windows = (coordinates // size).reshape(-1, size * size, 2)
        assert (windows == windows[:, :1]).all()
        columns = -(-grid[1] // size)
        assert np.array_equal(windows[:, 0, 0] * columns + windows[:, 0, 1], np.arange(len(windows)))

    @property_test
    @given(directions, flips, grids)
    def test_gather_and_scatter_are_adjoint(self, name, flip, grid):
        """Walking forth and back restores the tokens, and so does the gradient."""
        path = scan_path(name + flip, grid)
        index = scan_order(name + flip, grid, torch.device("cpu"))[0].long()
        tokens = torch.arange(1.0, path.num_tokens + 1, requires_grad=True)
        walked = tokens[index]
        restored = torch.zeros(path.num_tokens).index_put((index,), walked)
        mine = torch.from_numpy(path.inverse[0] >= 0)
        assert torch.equal(restored, torch.where(mine, tokens, 0.0))
        weights = torch.arange(float(path.num_tokens))
        (gradient,) = torch.autograd.grad((restored * weights).sum(), tokens)
        assert torch.equal(gradient, torch.where(mine, weights, 0.0))


class TestTables:
    def test_are_shared_and_read_only(self):
        path = scan_path("h,v", (3, 4))
        assert scan_path("h,v", [3, 4]) is path
        with pytest.raises(ValueError, match="read-only"):
            path.order[0, 0] = 1

    def test_order_on_a_device(self):
        table = scan_order("v,w2", (3, 4), torch.device("cpu"))
        assert table.dtype == torch.int32 and table.shape == (2, 16)
        assert torch.equal(table, torch.from_numpy(scan_path("v,w2", (3, 4)).order.copy()))
        assert scan_order("v,w2", (3, 4), torch.device("cpu")) is table

    def test_made_in_inference_mode_serves_training(self):
        with torch.inference_mode():
            table = scan_order("v_flip", (5, 11), torch.device("cpu"))
        torch.ones(55, requires_grad=True)[table[0]].sum().backward()

    def test_new_direction_is_one_function(self):
        @register_direction("diagonal_for_test")
        def diagonals(grid, memory_grid):
            rows, columns = np.indices(grid)
            return np.lexsort((rows.ravel(), (rows + columns).ravel()))

        assert order("diagonal_for_test", (2, 3)) == [0, 1, 3, 2, 4, 5]
        assert order("diagonal_for_test_flip", (2, 3)) == [5, 4, 2, 3, 1, 0]


class TestErrors:
    @pytest.mark.parametrize(
        "name", ["", "x", "h,", "h;v", "flip", "w", "w0", "sub_000", "sub_21", "snake", "tt", "hhw", "cls"]
    )
    def test_unknown_direction(self, name):
        with pytest.raises(ValueError, match=r"path: unknown direction .*; known are h, v, snake_h"):
            scan_path(name, (4, 4))

    @pytest.mark.parametrize("name", ["v", "snake_h", "snake_v", "w2", "sub_200"])
    @pytest.mark.parametrize("grid", [(4,), (2, 2, 2)])
    def test_rank_of_two_dimensional_directions(self, name, grid):
        with pytest.raises(ValueError, match=rf"grid: direction .* expects \(rows, columns\), got \({grid[0]},"):
            scan_path(name, grid)

    @pytest.mark.parametrize(("name", "grid"), [("thw", (2, 2)), ("wh", (2, 2, 2)), ("hw", (4,))])
    def test_rank_of_axis_orders(self, name, grid):
        with pytest.raises(ValueError, match=f"grid: direction '{name}' expects {len(name)} axes, got"):
            scan_path(name, grid)

    def test_sub_grid_offset(self):
        with pytest.raises(ValueError, match="sub_SYX expects Y and X below S, got S = 2, Y = 0, X = 2"):
            scan_path("sub_202", (4, 4))

    @pytest.mark.parametrize("grid", [(), (0, 4), (3, -1)])
    def test_sizes(self, grid):
        with pytest.raises(ValueError, match="grid: expected positive sizes"):
            scan_path("h", grid)
