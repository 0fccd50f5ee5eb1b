"""What models look at: maps against gradients and against what is known of small models."""

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

from visionmamba.analysis.maps import (
    ImageGrid,
    ScanCall,
    activation_maps,
    effective_receptive_field,
    grad_cam,
    image_grid,
    scan_calls,
    scan_reach,
)
from visionmamba.ops import selective_scan
from visionmamba.ops.scan_path import scan_path

MODELS = ["test_vim", "test_vmamba", "test_plainmamba", "test_local_vim", "test_local_vmamba", "test_efficient_vmamba"]
IMAGE_MODELS = [*MODELS, "test_mamba2d"]


def _model(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    return model, torch.randn(1, *size)


class TestScanReach:
    @pytest.mark.parametrize(
        "path, grid, in_step_order",
        [
            ("h,h_flip,v,v_flip", (3, 4), False),
            ("snake_h,snake_v_flip", (3, 4), True),
            ("w2,snake_h", (3, 3), False),
            ("h,v_flip|cls", (2, 3), False),
            ("sub_200,subT_210,sub_201,subT_211", (4, 4), False),
        ],
    )
    def test_it_is_the_derivative_of_the_output_by_the_input(self, path, grid, in_step_order):
        torch.manual_seed(0)
        walked = scan_path(path, grid)
        length, directions, channels, states = walked.num_tokens, walked.num_directions, 3, 2
        u = torch.randn(1, length, channels, requires_grad=True)
        delta, bias = torch.randn(1, length, directions, channels), torch.randn(directions, channels)
        A = -torch.rand(directions, channels, states) - 0.1
        B, C = torch.randn(2, 1, length, directions, states)
        captured = []

        class Model(nn.Module):
            def forward(self, x):
                y, _ = selective_scan(
                    x, delta, A, B, C, None, None, bias, path=path, grid=list(grid), merge=False,
                    projections_in_step_order=in_step_order,
                )  # fmt: skip
                captured.append(y)
                return y

        (call,) = scan_calls(Model(), u.detach())
        y = Model()(u)
        for token in (0, length // 2, length - 1):
            reach = scan_reach(call, token)
            for k in range(directions):
                gradients = [torch.autograd.grad(y[0, token, k, d], u, retain_graph=True)[0][0, :, d] for d in range(3)]
                expected = torch.stack(gradients).abs().mean(0)
                np.testing.assert_allclose(reach[k], expected, rtol=1e-4, atol=1e-6)

    def test_decay_is_one_at_the_token_itself_and_falls_along_the_path(self):
        ones = torch.ones(4, 1, 1)
        call = ScanCall("", "h_flip", (2, 2), ones, -ones[:1], ones, ones, False)
        (reach,) = scan_reach(call, 1, decay_only=True)
        np.testing.assert_allclose(reach, [0, 1, np.exp(-1), np.exp(-2)], rtol=1e-6)

    def test_scans_of_a_model_are_named(self):
        model, x = _model("test_vmamba")
        calls = scan_calls(model, x)
        assert len(calls) == 5
        assert calls[0].layer.startswith("stages.0.blocks.0.mixer")
        assert calls[0].grid == (8, 8)
        assert scan_calls(timm.create_model("test_vit").eval(), torch.zeros(1, 3, 160, 160)) == []

    def test_tokens_beside_a_class_token(self):
        model, x = _model("test_vim")
        call = scan_calls(model, x)[0]  # over 8 x 8 tokens and one in their middle
        grid = image_grid(call, model, x)
        assert grid == ImageGrid((8, 8), (8, 8), True)
        assert [grid.token(0, 0), grid.token(3, 7), grid.token(4, 0), grid.token(7, 7)] == [0, 31, 33, 64]
        values = np.insert(np.arange(64.0), 32, -1)
        np.testing.assert_array_equal(grid.as_map(values), np.arange(64.0).reshape(8, 8))
        with pytest.raises(ValueError, match="token: expected a place within 8 x 8, got 8, 0"):
            grid.token(8, 0)

    def test_padding_is_cut_off(self):
        grid = ImageGrid((2, 3), (4, 4), False)
        assert grid.token(1, 2) == 6
        np.testing.assert_array_equal(grid.as_map(np.arange(16)), [[0, 1, 2], [4, 5, 6]])


class TestReceptiveField:
    def test_a_convolution_sees_its_kernel(self):
        class Convolution(nn.Conv2d):
            def forward_intermediates(self, x, **_options):
                return [self(x)]

        model = Convolution(3, 4, 5, padding=2)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        field = effective_receptive_field(model, torch.rand(1, 3, 11, 11))
        expected = np.zeros((11, 11))
        expected[3:8, 3:8] = 1
        np.testing.assert_allclose(field, expected, atol=1e-6)

    @pytest.mark.parametrize("name", ["test_vmamba", "test_vim"])
    def test_scans_see_everything(self, name):
        model, x = _model(name)
        field = effective_receptive_field(model, x)
        assert field.shape == tuple(x.shape[-2:])
        assert (field > 0).mean() > 0.9
        assert all(parameter.grad is None for parameter in model.parameters())


class TestGradCam:
    @pytest.mark.parametrize("name", [*IMAGE_MODELS, "test_vit", "test_convnext"])
    def test_every_family_and_timms(self, name):
        model, x = _model(name)
        cam, target = grad_cam(model, x)
        assert target == int(model(x).argmax())
        assert cam.ndim == 2
        assert 0 <= cam.min() <= cam.max() <= 1

    def test_evidence_is_where_the_class_is(self):
        """A model that finds class 0 where an image is bright."""

        class Bright(nn.Module):
            feature_info = ({"module": "conv", "num_chs": 1, "reduction": 1},)

            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 1, 1, bias=False)
                nn.init.ones_(self.conv.weight)

            def forward(self, x):
                return torch.stack([self.conv(x).mean((1, 2, 3)), torch.zeros(1)], dim=1)

            def forward_intermediates(self, x, indices, **_options):
                return [self.conv(x)]

        x = torch.zeros(1, 3, 4, 4)
        x[..., 1, 2] = 1
        cam, target = grad_cam(Bright(), x)
        assert target == 0
        assert cam[1, 2] == 1
        assert cam.sum() == 1

    def test_bad_layer_and_class(self):
        model, x = _model("test_vmamba")
        with pytest.raises(ValueError, match=r"layer: no module 'stages.9' in the model; feature levels are stages.0"):
            grad_cam(model, x, layer="stages.9")
        with pytest.raises(ValueError, match="class: expected 0 to 999, got 1000"):
            grad_cam(model, x, target=1000)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_activations_of_every_family(name):
    model, x = _model(name)
    maps = activation_maps(model, x, levels=3)
    assert len(maps) == 3
    for values in maps.values():
        assert values.min() == 0
        assert values.max() == pytest.approx(float(values.size > 1))
