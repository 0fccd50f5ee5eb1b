"""LocalVMamba against the official outputs and gradients, and as timm's users call it."""

import pytest
import timm
import torch
from golden import cases, golden

from visionmamba.layers import ChannelAttention
from visionmamba.models.local_vmamba import checkpoint_filter_fn, official_state_dict

MICRO = "test_local_vmamba"


@pytest.mark.parametrize(
    "name",
    [case for case in cases("localmamba", "classification", fast=("local_vssm_tiny_sq192",)) if "vssm" in case.id],
)
def test_official_outputs_and_gradients(name, tmp_path):
    case = golden(name)
    model = case.create_model(tmp_path)
    features = {}

    def keep(module, key):
        module.register_forward_hook(lambda _m, _i, out: features.update({key: out}))

    keep(model.patch_embed, "feat0")
    for i, stage in enumerate(model.stages):
        keep(stage, f"feat{2 * i + 1}")
        if i:
            keep(stage.downsample, f"feat{2 * i}")
    keep(model.norm, "feat8")
    logits = model(case.input)
    case.check_logits(logits)
    assert len(features) == 9
    for key, feature in features.items():
        case.check_feature(key, feature)
    logits.float().pow(2).mean().backward()
    case.check_gradients(model, official_state_dict)


@pytest.mark.parametrize(("name", "millions"), [("local_vssm_tiny_search", 4.577), ("local_vssm_small_search", 9.149)])
def test_published_sizes_of_the_supernets(name, millions):
    """The authors' supernets count the channel attentions, which their search does not use."""
    model = timm.create_model(name, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    for stage in model.stages:
        dim = stage.blocks[0].mixer.out_proj.in_features
        attention = ChannelAttention(dim, device="meta")
        count += len(stage.blocks) * sum(parameter.numel() for parameter in attention.parameters())
    assert round(count / 1e6, 3) == millions


@pytest.mark.parametrize("kwargs", [{}, {"search": True}, {"num_classes": 0}])
def test_the_filters_are_inverse(kwargs):
    model = timm.create_model(MICRO, **kwargs)
    ours = model.state_dict()
    again = checkpoint_filter_fn(official_state_dict(ours, model), model)
    assert set(again) == set(ours)
    assert all(torch.equal(again[key], value) for key, value in ours.items())


@pytest.mark.parametrize("size", [(32, 32), (36, 52), (61, 33)])
def test_any_image_size(size):
    """Maps that windows do not tile, or that are smaller than one, are padded and cropped."""
    model = timm.create_model(MICRO).eval()
    features = model.forward_intermediates(torch.randn(2, 3, *size), intermediates_only=True)
    assert features[0].shape[2:] == tuple(side // 4 for side in size)
    assert all(feature.isfinite().all() for feature in features)


def test_square_images_do_not_depend_on_the_realignment():
    torch.manual_seed(0)
    model = timm.create_model(MICRO).eval()
    realigned = timm.create_model(MICRO, realign_columns=True).eval()
    realigned.load_state_dict(model.state_dict())
    square, wide = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(realigned(square), model(square))
    assert (realigned(wide) - model(wide)).abs().max() > 1e-6


def test_bad_directions():
    with pytest.raises(ValueError, match="directions: expected one path for each of the 4 layers, got 2"):
        timm.create_model(MICRO, directions=["h", "v"])
    with pytest.raises(ValueError, match=r"directions: expected some of h, .*got 'w3'"):
        timm.create_model(MICRO, directions="h,w3")
    with pytest.raises(ValueError, match="directions: expected the 33 scan paths"):
        timm.create_model("local_vssm_small", pretrained=True)


def test_compiles_and_exports():
    model = timm.create_model(MICRO).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(torch.cat([x, x])), torch.cat([expected, expected]))
