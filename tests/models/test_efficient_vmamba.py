"""EfficientVMamba against the official outputs and gradients, and as timm's users call it."""

import pytest
import timm
import torch
from golden import cases, golden, golden_names

from visionmamba.layers import OutputNorms
from visionmamba.models.efficient_vmamba import checkpoint_filter_fn, official_state_dict

MICRO = "test_efficient_vmamba"


def check_everything(case, model):
    features = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda _m, _i, out, i=i: features.update({f"feat{i}": out}))
    logits = model(case.input)
    case.check_logits(logits)
    for name, feature in features.items():
        case.check_feature(name, feature)
    logits.float().pow(2).mean().backward()
    case.check_gradients(model, official_state_dict)


@pytest.mark.parametrize("name", cases("efficient_vmamba", "classification", fast=("efficient_vmamba_tiny_160x224",)))
def test_official_outputs_and_gradients(name, tmp_path):
    case = golden(name)
    check_everything(case, case.create_model(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_names("efficient_vmamba", "ablation"))
def test_official_ablations(name, tmp_path):
    case = golden(name)
    check_everything(case, case.create_model(tmp_path, "efficient_vmamba_small", dims=case.info["ctor"]["dims"]))


@pytest.mark.slow
def test_official_backbone(tmp_path):
    """Feature maps before the downsampling, each under its own norm."""
    case = golden("efficient_vmamba/efficient_vmamba_tiny_backbone")
    weights = case.official_weights()
    norms = {key: weights.pop(key) for key in list(weights) if key.startswith("outnorm")}
    weights |= {"classifier.norm.weight": torch.ones(384), "classifier.norm.bias": torch.zeros(384)}  # not used here
    model = case.create_model(tmp_path, weights=weights, num_classes=0)
    output_norms = OutputNorms([info["num_chs"] for info in model.feature_info])
    output_norms.load_state_dict({key.replace("outnorm", "norms."): value for key, value in norms.items()})
    outputs = output_norms(model.forward_intermediates(case.input, intermediates_only=True))
    for i, output in enumerate(outputs):
        case.check_feature(f"out{i}", output)


def test_the_filters_are_inverse():
    model = timm.create_model(MICRO)
    ours = model.state_dict()
    again = checkpoint_filter_fn(official_state_dict(ours, model), model)
    assert set(again) == set(ours)
    assert all(torch.equal(again[key], value) for key, value in ours.items())


@pytest.mark.parametrize("size", [(32, 32), (36, 52), (61, 33)])
def test_any_image_size(size):
    """Odd maps are padded for the sub-grids and cropped afterwards."""
    model = timm.create_model(MICRO).eval()
    features = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    assert [feature.shape[1] for feature in features] == [24, 48, 64, 96]
    assert features[0].shape[2:] == tuple(side // 4 for side in size)
    assert all(feature.isfinite().all() for feature in features)


def test_every_token_reaches_the_output():
    """No token is left out of the four sub-grids, also where the map is odd."""
    mixer = timm.create_model(MICRO).stages[0].blocks[0].mixer
    x = torch.randn(1, 5, 7, 48, requires_grad=True)
    mixer.scan(x).sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_compiles_and_exports():
    model = timm.create_model(MICRO).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(torch.cat([x, x])), torch.cat([expected, expected]))
