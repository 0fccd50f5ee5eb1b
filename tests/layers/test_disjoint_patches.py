"""Convolutions of disjoint patches as matrix products."""

import pytest
import torch
import torch.nn as nn

from visionmamba.layers import GridPatchEmbed, StridedPatchEmbed, disjoint_patches
from visionmamba.layers.disjoint_patches import is_product_of_patches, product_of_patches

CONVOLUTIONS = [
    (nn.Conv2d(3, 8, 4, 4), (2, 3, 13, 16), (3, 4)),
    (nn.Conv2d(2, 5, (2, 3), (2, 3), bias=False), (1, 2, 4, 7), (2, 2)),
    (nn.Conv3d(3, 4, (1, 4, 2), (1, 4, 2)), (2, 3, 3, 9, 6), (3, 2, 3)),
]


@pytest.mark.parametrize(("conv", "shape", "grid"), CONVOLUTIONS)
def test_against_the_convolution(conv, shape, grid):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    conv = conv.double()
    results = []
    for function in (lambda x: conv(x).movedim(1, -1), lambda x: product_of_patches(x, conv)):
        conv.zero_grad()
        x.grad = None
        out = function(x)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in conv.parameters())])
    assert results[1][0].shape == (shape[0], *grid, conv.out_channels)
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype, monkeypatch):
    monkeypatch.setattr(disjoint_patches, "fuses", lambda _x: True)
    torch.manual_seed(0)
    for embed, x in (
        (StridedPatchEmbed((32, 48), 16, in_chans=2, embed_dim=4), torch.randn(2, 2, 32, 48)),
        (GridPatchEmbed((1, 8, 8), 3, 6, pad=True), torch.randn(2, 3, 3, 17, 16)),
    ):
        exact = embed(x)
        with torch.autocast("cpu", dtype):
            assert is_product_of_patches(x, embed.proj if isinstance(embed, StridedPatchEmbed) else embed.projection)
            found = embed(x)
        assert found.dtype == dtype
        assert float((found - exact).norm()) <= torch.finfo(dtype).eps * float(exact.norm())


def test_what_stays_a_convolution(monkeypatch):
    x, conv = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16), nn.Conv2d(3, 4, 4, 4, dtype=torch.bfloat16)
    assert not is_product_of_patches(x, conv)  # no GPU
    monkeypatch.setattr(disjoint_patches, "fuses", lambda _x: True)
    assert is_product_of_patches(x, conv)
    assert not is_product_of_patches(x.float(), conv)
    assert not is_product_of_patches(x[:, :2], conv)
    assert not is_product_of_patches(x[0], conv)
    for options in (dict(stride=2), dict(stride=4, padding=1), dict(stride=4, dilation=2)):
        assert not is_product_of_patches(x, nn.Conv2d(3, 4, 4, **options))
    conv.register_forward_hook(lambda *_: None)
    assert not is_product_of_patches(x, conv)
