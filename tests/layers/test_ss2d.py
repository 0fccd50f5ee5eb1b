"""SS2D and its state space models against plain loops over lines and directions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging

from visionmamba.layers import OUT_NORMS, SS2D, CascadeSSM, ConvDownsample, ConvPatchEmbed, MultiHeadSSM, SelectiveSSM
from visionmamba.ops import path_scan_reference

HEIGHT, WIDTH = 5, 3


def tokens(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(3))


def scan_sequence(ssm, x: torch.Tensor, k: int) -> torch.Tensor:
    """One direction's recurrence over a sequence (L, D), step by step."""
    rank, states = ssm.dt_rank, ssm.d_state
    dt, B, C = (x @ ssm.x_proj_weight[k].T).split([rank, states, states], dim=-1)
    delta = F.softplus(dt @ ssm.dt_proj_weight[k].T + ssm.dt_proj_bias[k])
    A, h, outputs = -ssm.A_log[k].exp(), torch.zeros(ssm.d_inner, states), []
    for step in range(len(x)):
        h = torch.exp(delta[step, :, None] * A) * h + (delta[step] * x[step])[:, None] * B[step]
        outputs.append(h @ C[step] + ssm.D[k] * x[step])
    return torch.stack(outputs)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a random value, so that none hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def test_cross_scan_is_four_recurrences():
    mixer = randomised(SS2D(6, d_state=2, ssm_ratio=1.5))
    x = tokens(1, HEIGHT, WIDTH, 6)
    inner, z = mixer.in_proj(x).chunk(2, dim=-1)
    u = F.silu(F.conv2d(inner.permute(0, 3, 1, 2), mixer.conv.weight, mixer.conv.bias, padding=1, groups=9))[0]
    y = torch.zeros(9, HEIGHT, WIDTH)
    for k, (transposed, reverse) in enumerate([(False, False), (True, False), (False, True), (True, True)]):
        grid = u.transpose(1, 2) if transposed else u
        line = grid.flatten(1).T
        out = scan_sequence(mixer.ssm, line.flip(0) if reverse else line, k)
        out = (out.flip(0) if reverse else out).T.reshape(grid.shape)
        y = y + (out.transpose(1, 2) if transposed else out)
    y = F.layer_norm(y.permute(1, 2, 0), [9], mixer.out_norm.weight, mixer.out_norm.bias, 1e-5)
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y * F.silu(z[0])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("realign", [False, True])
def test_cascade_scans_each_line_by_itself(realign):
    ssm = randomised(CascadeSSM(4, d_state=2, dt_rank=2, realign=realign))

    def both_ways(lines: torch.Tensor, first: int) -> torch.Tensor:
        lines = F.layer_norm(lines, [4])
        forward = torch.stack([scan_sequence(ssm, line, first) for line in lines])
        backward = torch.stack([scan_sequence(ssm, line.flip(0), first + 1) for line in lines])
        return forward + (backward.flip(1) if realign else backward)

    x = tokens(1, HEIGHT * WIDTH, 4)
    rows = both_ways(x.reshape(HEIGHT, WIDTH, 4), 0)
    columns = both_ways(rows.transpose(0, 1), 2)
    expected = columns.transpose(0, 1).reshape(1, HEIGHT * WIDTH, 4)
    torch.testing.assert_close(ssm(x, None, [HEIGHT, WIDTH]), expected, atol=1e-5, rtol=1e-5)


def test_heads_are_channels_with_equal_steps():
    """A multi-head model is a selective one whose channels of a head share the step size and the decay."""
    heads = randomised(MultiHeadSSM(6, d_state=3, num_heads=2))
    x = tokens(2, HEIGHT * WIDTH, 6)
    projected = torch.einsum("bld,kcd->blkc", x, heads.x_proj_weight)
    dt, B, C = projected.split([2, 3, 3], dim=-1)
    spread = [
        parameter.repeat_interleave(3, dim=-1) for parameter in (dt, heads.A_log, heads.dt_proj_bias)
    ]  # to the 3 channels of each head
    A = -spread[1].exp().unsqueeze(-1).expand(4, 6, 3)
    y, _ = path_scan_reference(
        x, spread[0], A, B, C, heads.D.flatten(1), None, spread[2], path=heads.path, grid=(HEIGHT, WIDTH)
    )
    torch.testing.assert_close(heads(x, None, [HEIGHT, WIDTH]), y, atol=1e-5, rtol=1e-5)


def test_heads_divide_the_channels():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the 6 channels, got 4"):
        MultiHeadSSM(6, num_heads=4)


@pytest.mark.parametrize("out_norm", OUT_NORMS)
def test_out_norms(out_norm):
    x = tokens(2, HEIGHT, WIDTH, 8)
    module = SS2D(8, out_norm=out_norm, ssm_ratio=1.0).out_norm
    y = module(x)
    assert y.shape == x.shape
    expected = {
        "none": x,
        "layer": F.layer_norm(x, [8]),
        "softmax": x.reshape(2, -1, 8).softmax(1).reshape(x.shape),
        "sigmoid": x.sigmoid(),
    }
    if out_norm in expected:
        torch.testing.assert_close(y, expected[out_norm])
    else:
        conv = module if out_norm == "dwconv" else module[1]
        source = x if out_norm == "dwconv" else F.layer_norm(x, [8])
        expected = F.conv2d(source.permute(0, 3, 1, 2), conv.weight, padding=1, groups=8).permute(0, 2, 3, 1)
        torch.testing.assert_close(y, expected)


def test_uniform_init_is_the_authors_second():
    ssm = SS2D(32, ssm_init="uniform", d_state=4).ssm
    assert isinstance(ssm, SelectiveSSM)
    assert ssm.A_log.abs().max() == 0 and ssm.D.min() == 1
    for parameter in (ssm.dt_proj_weight, ssm.dt_proj_bias):
        assert parameter.min() >= 0 and parameter.max() <= 0.1


@pytest.mark.parametrize("kernel_size, size", [(3, (4, 3)), (2, (3, 2))])
def test_downsampling_of_odd_maps(kernel_size, size):
    """A padded kernel of 3 keeps the last odd row; a kernel of 2 drops it."""
    x = tokens(1, 7, 5, 4)
    assert ConvDownsample(4, 6, kernel_size)(x).shape == (1, *size, 6)


def test_merging_pads_odd_maps_with_zeros_at_the_end():
    merge = randomised(PatchMerging(4))
    x = tokens(1, 5, 7, 4)
    torch.testing.assert_close(merge(x), merge(F.pad(x, (0, 0, 0, 1, 0, 1))))
    quad = F.pad(x, (0, 0, 0, 1, 0, 1))[0, :2, :2]
    parts = torch.cat([quad[0, 0], quad[1, 0], quad[0, 1], quad[1, 1]])  # rows vary first, as in the official order
    torch.testing.assert_close(merge(x)[0, 0, 0], merge.reduction(merge.norm(parts)))


def test_conv_patch_embed_takes_any_size():
    embed = ConvPatchEmbed(4, 3, 8)
    assert embed(tokens(2, 3, 30, 17)).shape == (2, 8, 5, 8)
    assert embed(tokens(2, 3, 30, 17)).is_contiguous()
