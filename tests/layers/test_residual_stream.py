import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from visionmamba.layers import (
    ResidualBlock,
    SimpleFeaturePyramid,
    StreamLayerNorm,
    StreamRMSNorm,
    StridedPatchEmbed,
    apply_rope,
    axial_rope_table,
)


def test_rms_norm():
    norm = StreamRMSNorm(6, eps=1e-5)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("norm_layer", [StreamRMSNorm, StreamLayerNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_compute_in_the_streams_dtype(norm_layer, dtype):
    x = 300 * torch.randn(2, 3, 64)  # its squares overflow float16
    norm = norm_layer(64, eps=1e-5)
    expected = norm(x)
    actual = norm.to(dtype)(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.to(dtype))


@pytest.mark.parametrize("rope", ["", "mixer", "stream"])
def test_blocks_are_add_norm_mix(rope):
    """A chain of blocks is the authors' recursion over pairs (hidden, residual), which rotates before it adds."""
    linears = [nn.Linear(8, 8) for _ in range(3)]
    norms = [StreamRMSNorm(8) for _ in range(3)]
    table = axial_rope_table(8, [2, 3])
    x = torch.randn(2, 6, 8)

    hidden, residual = x, None
    for mixer, norm in zip(linears, norms, strict=True):
        if rope:
            hidden = apply_rope(hidden, table)
        if rope == "stream" and residual is not None:
            residual = apply_rope(residual, table)
        residual = hidden if residual is None else residual + hidden
        hidden = 0.5 * mixer(norm(residual))

    stream = apply_rope(x, table) if rope else x
    for i, (linear, norm) in enumerate(zip(linears, norms, strict=True)):
        block = ResidualBlock(lambda x, grid, linear=linear: linear(x), norm, scale=0.5, rope=rope if i < 2 else "")
        stream, mixed = block.step(stream, [2, 3], table)
    torch.testing.assert_close(stream, residual + hidden)
    torch.testing.assert_close(0.5 * mixed, hidden)


@pytest.mark.parametrize(("size", "stride", "grid"), [(224, 8, (27, 27)), ((50, 33), 16, (3, 2)), (16, None, (1, 1))])
def test_strided_patches(size, stride, grid):
    embed = StridedPatchEmbed(size, 16, stride, in_chans=2, embed_dim=4)
    x = torch.randn(2, 2, *embed.img_size)
    assert embed.grid_size == grid and embed.num_patches == grid[0] * grid[1]
    expected = F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=stride or 16)
    torch.testing.assert_close(embed(x), expected.flatten(2).mT)


def test_strided_patches_refuse_other_sizes():
    with pytest.raises(ValueError, match="x: expected images of 32 x 48, got 32 x 32"):
        StridedPatchEmbed((32, 48))(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="img_size: expected at least a patch"):
        StridedPatchEmbed((32, 8))


def test_feature_pyramid_strides():
    pyramid = SimpleFeaturePyramid(4).eval()
    maps = pyramid([torch.randn(1, 4, 6, 10)] * 4)
    assert [tuple(feature.shape[2:]) for feature in maps] == [(24, 40), (12, 20), (6, 10), (3, 5)]
