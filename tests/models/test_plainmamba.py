import math

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import cases, golden

from visionmamba.models.plainmamba import SNAKES, DirectionAwareSSM, checkpoint_filter_fn, official_state_dict
from visionmamba.ops.scan_moves import scan_moves
from visionmamba.ops.scan_path import scan_path

OPTIONS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_plainmamba").eval()


@pytest.mark.parametrize("name", cases("plainmamba", fast=("plainmamba_l1_160x224",)))
def test_golden(name, tmp_path):
    case = golden(name)
    model = case.create_model(tmp_path)
    features = {}
    model.patch_embed.register_forward_hook(lambda _m, _i, output: features.update(feat0=output.flatten(1, 2)))
    with torch.no_grad():
        final, taps = model.forward_intermediates(case.input, indices=(5, 11, 17, 23), output_fmt="NLC")
        case.check_logits(model.forward_head(final))
        pooled = model.forward_head(final, pre_logits=True)
    features |= {f"feat{i}": tap for i, tap in enumerate(taps, start=1)}
    for key, feature in (features | {"feat5": final.flatten(1, 2), "feat6": pooled}).items():
        case.check_feature(key, feature)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("plainmamba"))
def test_golden_gradients(name, tmp_path):
    case = golden(name)
    model = case.create_model(tmp_path)
    model(case.input).float().pow(2).mean().backward()
    case.check_gradients(model, official_state_dict)


def test_official_layout_round_trip(model):
    official = official_state_dict(model.state_dict(), model)
    assert official["backbone.layers.0.mamba.direction_Bs"].shape == (5, 4)
    assert official["backbone.pos_embed"].shape == (1, 64, 48)
    for state_dict in (official, model.state_dict()):
        converted = checkpoint_filter_fn(dict(state_dict), model)
        torch.testing.assert_close(converted, dict(model.state_dict()), rtol=0, atol=0)


def naive_scan(ssm, u, z, grid):
    """The layer's definition, one direction, step and token at a time."""
    order = scan_path(ssm.path, grid).order
    codes = scan_moves(u, ssm.path, list(grid)).argmax(-1)  # (L, K)
    projected = u @ ssm.x_proj_weight[0].T
    dt, B, C = projected.split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
    delta = F.softplus(dt @ ssm.dt_proj_weight[0].T + ssm.dt_bias_scale * ssm.dt_proj_bias[0])
    A = -ssm.A_log[0].exp()
    y = torch.zeros_like(u)
    for k in range(len(order)):
        h = u.new_zeros(u.shape[0], ssm.d_inner, ssm.d_state)
        for t, token in enumerate(order[k]):
            row = t if ssm.in_step_order else token
            B_t = B[:, row] + ssm.direction_B[codes[t, k]]
            drive = (delta[:, row] * u[:, token])[:, :, None] * B_t[:, None]
            h = torch.exp(delta[:, row][:, :, None] * A) * h + drive
            y[:, token] += (h * C[:, row][:, None]).sum(-1) + ssm.D[0] * u[:, token]
    return y * F.silu(z)


@pytest.mark.parametrize(("permute", "once"), OPTIONS)
def test_scan_is_its_definition(permute, once):
    torch.manual_seed(0)
    ssm = DirectionAwareSSM(6, 4, 2, SNAKES, permute_projections=permute, add_dt_bias_once=once).double()
    torch.nn.init.normal_(ssm.direction_B)
    u, z = torch.randn(2, 2, 15, 6, dtype=torch.float64)
    torch.testing.assert_close(ssm(u, z, [3, 5]), naive_scan(ssm, u, z, (3, 5)))


def test_corrected_forms_differ(model):
    for block in model.blocks:
        for parameter in (block.mixer.ssm.direction_B, block.mixer.ssm.x_proj_weight, block.mixer.ssm.dt_proj_bias):
            torch.nn.init.normal_(parameter)
    x = torch.randn(1, 3, 64, 64)
    outputs = []
    for permute, once in OPTIONS:
        other = timm.create_model("test_plainmamba", permute_projections=permute, add_dt_bias_once=once).eval()
        other.load_state_dict(model.state_dict())
        outputs.append(other(x))
    for i in range(len(outputs)):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j], rtol=0, atol=1e-4)


def test_initialisation_is_the_authors():
    authors, careful = timm.create_model("plainmamba_l1", depth=1), timm.create_model("test_plainmamba", depth=1)
    assert authors.blocks[0].mixer.ssm.dt_proj_bias.abs().max() == 0
    steps = F.softplus(careful.blocks[0].mixer.ssm.dt_proj_bias)
    assert steps.min() > 9e-4 and steps.max() < 0.11


@pytest.mark.parametrize("size", [(64, 64), (40, 88), (33, 47), (1, 1), (5, 64)])
def test_any_image_size(model, size):
    features = model.forward_features(torch.randn(2, 3, *size))
    assert features.shape == (2, math.ceil(size[0] / 8), math.ceil(size[1] / 8), 48)
    assert features.isfinite().all()


def test_set_input_size_agrees_with_resizing_on_the_fly(model):
    x = torch.randn(1, 3, 96, 80)
    expected = model(x)
    model.set_input_size((96, 80))
    assert model.pos_embed.shape == (1, 12, 10, 48)
    torch.testing.assert_close(model(x), expected)


def test_checkpoint_of_another_size(model, tmp_path):
    torch.save(official_state_dict(model.state_dict(), model), tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth")}
    larger = timm.create_model("test_plainmamba", pretrained=True, img_size=(96, 80), pretrained_cfg_overlay=overlay)
    x = torch.randn(1, 3, 96, 80)
    torch.testing.assert_close(larger.eval()(x), model(x))


def test_exports_for_any_size():
    model = timm.create_model("test_plainmamba", depth=2).eval()
    height, width = 8 * torch.export.Dim("rows", min=2, max=32), 8 * torch.export.Dim("columns", min=2, max=32)
    x = torch.randn(2, 3, 64, 64)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {2: height, 3: width}}).module()
    for image in (x, torch.randn(2, 3, 72, 40)):
        torch.testing.assert_close(exported(image), model(image))


@pytest.mark.parametrize("sizes", [[64], pytest.param([64, 40, 72], marks=pytest.mark.slow)])
def test_compiles_without_breaks(sizes):
    model = timm.create_model("test_plainmamba", depth=2).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in sizes:
        x = torch.randn(2, 3, size, 64)
        torch.testing.assert_close(compiled(x), model(x))


def test_bad_input():
    with pytest.raises(ValueError, match="x: expected"):
        timm.create_model("test_plainmamba")(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="path"):
        timm.create_model("test_plainmamba", path="h,v")(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="global_pool"):
        timm.create_model("test_plainmamba", global_pool="token")
