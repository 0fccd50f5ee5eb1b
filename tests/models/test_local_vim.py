"""LocalVim against the official outputs and gradients, and as timm's users call it."""

import pytest
import timm
import torch
from golden import cases, golden

from visionmamba.layers import ChannelAttention
from visionmamba.models.local_vim import checkpoint_filter_fn, official_state_dict

MICRO = "test_local_vim"
FAST = ("local_vim_tiny_160x224", "local_vim_tiny_middle_cls_token")


@pytest.mark.parametrize(
    "name", [case for case in cases("localmamba", "classification", fast=FAST) if "vim" in case.id]
)
def test_official_outputs_and_gradients(name, tmp_path):
    case = golden(name)
    model = case.create_model(tmp_path)
    features = {}
    model.patch_embed.register_forward_hook(lambda _m, _i, out: features.update(feat0=out))
    for n, i in enumerate((4, 9, 14, 19)):
        block = model.blocks[i]
        block.mixer.register_forward_hook(lambda _m, _i, out, n=n: features.update({f"feat{2 * n + 1}": out}))
        block.norm.register_forward_pre_hook(lambda _m, args, n=n: features.update({f"feat{2 * n + 2}": args[0]}))
    model.head_drop.register_forward_hook(lambda _m, _i, out: features.update(feat9=out))
    logits = model(case.input)
    case.check_logits(logits)
    assert len(features) == 10
    for key, feature in features.items():
        case.check_feature(key, feature)
    logits.float().pow(2).mean().backward()
    case.check_gradients(model, official_state_dict)


def test_tables_of_the_rotary_embedding_are_not_needed(tmp_path):
    case = golden("localmamba/local_vim_tiny_160x224")
    model = case.create_model(tmp_path, weights=case.official_weights(tables=True))
    case.check_logits(model(case.input))


def test_published_size_of_the_supernet():
    """The authors' supernet counts the channel attentions, which its search does not use."""
    model = timm.create_model("local_vim_tiny_search", device="meta")
    attention = sum(parameter.numel() for parameter in ChannelAttention(256, device="meta").parameters())
    count = sum(parameter.numel() for parameter in model.parameters()) + len(model.blocks) * attention
    assert round(count / 1e6, 3) == 5.473


@pytest.mark.parametrize(
    "kwargs", [{}, {"search": True}, {"class_token": "middle", "global_pool": "token", "rope": ""}]
)
def test_the_filters_are_inverse(kwargs):
    model = timm.create_model(MICRO, **kwargs)
    ours = model.state_dict()
    again = checkpoint_filter_fn(official_state_dict(ours, model), model)
    assert set(again) == set(ours)
    assert all(torch.equal(again[key], value) for key, value in ours.items())


@pytest.mark.parametrize("kwargs", [{}, {"class_token": "middle", "global_pool": "token", "rope": ""}])
@pytest.mark.parametrize("size", [(64, 64), (40, 96), (33, 61)])
def test_any_image_size(size, kwargs):
    """Images are padded to whole patches, grids to whole windows, also around a class token."""
    model = timm.create_model(MICRO, **kwargs).eval()
    x = torch.randn(2, 3, *size)
    features = model.forward_intermediates(x, intermediates_only=True)
    assert features[0].shape == (2, 48, -(-size[0] // 8), -(-size[1] // 8))
    assert model(x).isfinite().all()


def test_corrected_forms_agree_where_there_is_nothing_to_correct():
    torch.manual_seed(0)
    model = timm.create_model(MICRO).eval()
    corrected = timm.create_model(MICRO, realign_columns=True, rope_resize="recompute").eval()
    corrected.load_state_dict(model.state_dict())
    square, wide = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(corrected(square), model(square))
    assert (corrected(wide) - model(wide)).abs().max() > 1e-6


def test_initial_step_sizes():
    """The published models begin with a bias of 0; the corrected form spreads step sizes as Mamba does."""
    official = timm.create_model(MICRO).blocks[0].mixer.ssm.directions.dt_proj_bias
    corrected = timm.create_model(MICRO, init_dt=True).blocks[0].mixer.ssm.directions.dt_proj_bias
    assert (official == 0).all()
    assert (torch.nn.functional.softplus(corrected) <= 0.1001).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="directions: expected one path for each of the 3 layers, got 2"):
        timm.create_model(MICRO, directions=["h", "v"])
    with pytest.raises(ValueError, match="rope_resize: expected"):
        timm.create_model(MICRO, rope_resize="nearest")


def test_compiles_and_exports():
    model = timm.create_model(MICRO).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(torch.cat([x, x])), torch.cat([expected, expected]))
