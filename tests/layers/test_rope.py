import pytest
import torch

from visionmamba.layers import apply_rope, axial_rope_table


def rotate(x, grid, reference_size):
    """Multiply neighbouring pairs of channels, as complex numbers, by exp(i position frequency), token by token."""
    dim = x.shape[-1]
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    out = torch.empty((*x.shape[:-1], dim // 2), dtype=torch.complex128)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    for token in range(grid[0] * grid[1]):
        row, column = divmod(token, grid[1])
        by_row = row / grid[0] * reference_size * frequencies
        by_column = column / grid[1] * reference_size * frequencies
        out[:, token] = pairs[:, token] * torch.exp(1j * torch.cat([by_row, by_column]))
    return torch.view_as_real(out).flatten(-2)


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (14, 14)])
@pytest.mark.parametrize("reference_size", [14, 7])
def test_rotation(grid, reference_size):
    x = torch.randn(2, grid[0] * grid[1], 24)
    table = axial_rope_table(24, list(grid), reference_size=reference_size)
    torch.testing.assert_close(apply_rope(x, table).double(), rotate(x, grid, reference_size), atol=1e-5, rtol=0)


def test_rotation_keeps_norms_and_is_linear():
    x, y = torch.randn(2, 1, 12, 8)
    table = axial_rope_table(8, [3, 4])
    torch.testing.assert_close(apply_rope(x, table).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(apply_rope(x + y, table), apply_rope(x, table) + apply_rope(y, table))


@pytest.mark.parametrize("rows", [[0], [6], [0, 13], [0, 1]])
def test_class_tokens_are_not_rotated(rows):
    x = torch.randn(1, 12 + len(rows), 8)
    rotated = apply_rope(x, axial_rope_table(8, [3, 4], rows))
    torch.testing.assert_close(rotated[:, rows], x[:, rows])
    patches = [i for i in range(x.shape[1]) if i not in rows]
    torch.testing.assert_close(rotated[:, patches], apply_rope(x[:, patches], axial_rope_table(8, [3, 4])))


def test_dtype_is_kept():
    table = axial_rope_table(8, [3, 4])
    for dtype in (torch.bfloat16, torch.float64):
        assert apply_rope(torch.randn(1, 12, 8, dtype=dtype), table).dtype == dtype
