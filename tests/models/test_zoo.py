"""The zoo as a whole: which models there are, their published sizes, cfgs and features, and what timm's users do."""

import copy
import re
from fnmatch import fnmatch

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.models._input import get_model_input_config

from visionmamba.inference import input_size
from visionmamba.layers import class_token_indices, remove_class_token
from visionmamba.models import FAMILIES
from visionmamba.zoo import model_names, published_top1, weights_source

MICRO = (
    "test_efficient_vmamba",
    "test_local_vim",
    "test_local_vmamba",
    "test_mamba2d",
    "test_mamba3d",
    "test_plainmamba",
    "test_vim",
    "test_vmamba",
)
# Parameters that the authors' own models count, with 1000 classes and at the nominal size where nothing else is said.
PUBLISHED_SIZES = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_224": 25_796_584,
    "vim_small_patch16_stride8_224": 26_001_256,
    "vim_base_patch16_224": 97_598_440,
    "vanilla_vmamba_tiny": 22_893_448,
    "vanilla_vmamba_small": 44_417_416,
    "vanilla_vmamba_base": 76_254_056,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s2l15": 88_557_800,
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_tiny_m2": 25_340_296,
    "vmamba_small_m2": 39_079_816,
    "vmamba_base_m2": 67_527_528,
    "plainmamba_l1": 7_551_656,
    "plainmamba_l2": 26_145_832,
    "plainmamba_l3": 50_956_456,
    "local_vim_tiny": 7_994_152,
    "local_vim_tiny_middle_cls_token": 7_994_536,
    "local_vim_tiny_wo_search": 7_994_152,
    "local_vim_small": 27_783_784,
    "local_vim_small_searched": 27_783_784,
    "local_vssm_tiny": 25_527_160,
    "local_vssm_small": 49_748_536,
    "efficient_vmamba_tiny": 6_493_660,
    "efficient_vmamba_small": 11_273_688,
    "efficient_vmamba_base": 33_717_136,
    "mamba2d_small_patch8_224": 24_505_192,
    "mamba2d_base_patch8_224": 94_425_832,
    "mamba2d_small_patch16_224": 23_907_688,
    "mamba3d_small_ucf101": 36_674_320,  # with its 400 classes
    "mamba3d_small_hmdb51": 36_543_420,  # with its 60 classes
    "mamba3d_small_k400": 36_380_176,
    "mamba3d_small_btcv": 36_017_998 + (6**3 - 3**3) * 384,  # counted with the position embedding of 48 x 48 x 48
}
# The authors' supernets hold parameters that their search does not use: the families' own tests count those.
SUPERNETS = ("local_vim_tiny_search", "local_vssm_tiny_search", "local_vssm_small_search")
LICENSES = {
    "vim": "apache-2.0",
    "vmamba": "mit",
    "local_vim": "apache-2.0",
    "local_vmamba": "apache-2.0",
    "plainmamba": None,
    "efficient_vmamba": None,  # these repositories carry no licence
    "mamba_nd": None,
    "mamba_nd_btcv": None,
}
UNPUBLISHED_WEIGHTS = ("test_*", "*_search", "*_wo_search", "vmamba_*_m2")


def create(name, **kwargs):
    if name == "mamba3d_small_btcv":
        pytest.importorskip("monai")
    return timm.create_model(name, **kwargs)


def test_names():
    assert set(model_names()) == {*MICRO, *PUBLISHED_SIZES, *SUPERNETS}
    assert set(LICENSES) == set(FAMILIES)


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_published_size(name):
    model = create(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_SIZES[name]


@pytest.mark.parametrize("name", MICRO)
def test_micro_models_are_small(name):
    model = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000


@pytest.mark.parametrize("name", model_names())
def test_pretrained_cfg(name):
    cfg = timm.get_pretrained_cfg(name).to_dict()
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    assert cfg.get("license") == LICENSES[family]
    assert re.fullmatch(r"arXiv:24\d\d\.\d{5}", cfg["paper_ids"])
    assert len(cfg["paper_name"].split()) > 4
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+", cfg["origin_url"])
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0]
    unpublished = any(fnmatch(name, pattern) for pattern in UNPUBLISHED_WEIGHTS)
    assert (cfg["tag"] == "untrained") == unpublished
    source = weights_source(cfg)
    assert source is None if unpublished else source is None or source.startswith("https://")
    top1 = published_top1(cfg)
    assert top1 is None or 60 < top1 < 90
    assert unpublished or top1 is not None or name in ("mamba2d_small_patch16_224", "mamba3d_small_btcv")


def check_features(features, channels, reductions, size, overlap):
    assert len(features) == len(channels) == len(reductions)
    for feature, num_chs, reduction in zip(features, channels, reductions, strict=True):
        assert feature.shape[1] == num_chs
        assert feature.dim() == len(size) + 1
        assert feature.shape[-2:] == tuple((side - overlap) // reduction for side in size[-2:])


@pytest.mark.parametrize("name", model_names())
def test_features_are_as_announced(name):
    """Every block's, and those of ``features_only`` by default, at the nominal size."""
    model = create(name, device="meta").eval()
    size = input_size(model)
    overlap = 8 if "stride8" in name else 0  # of patches with their neighbours
    x = torch.empty(1, *size, device="meta")
    final, features = model.forward_intermediates(x)
    announced = [(info["num_chs"], info["reduction"]) for info in model.feature_info]
    check_features(features, *zip(*announced, strict=True), size, overlap)
    assert final.shape == model.forward_features(x).shape
    modules = dict(model.named_modules())
    assert all(info["module"] in modules for info in model.feature_info)

    backbone = create(name, device="meta", features_only=True).eval()
    info = backbone.feature_info
    check_features(backbone(x), info.channels(), info.reduction(), size, overlap)
    assert info.reduction() == sorted(info.reduction())


@pytest.fixture(params=MICRO)
def micro(request):
    """A micro model and two of its inputs."""
    torch.manual_seed(0)
    model = timm.create_model(request.param).eval()
    return model, torch.randn(2, *input_size(model))


def test_features_only_gives_the_intermediates(micro):
    model, x = micro
    with torch.no_grad():
        final, features = model.forward_intermediates(x)
        torch.testing.assert_close(final, model.forward_features(x))
        backbone = FeatureGetterNet(copy.deepcopy(model), out_indices=(0, 1, 2)).eval()
        torch.testing.assert_close(backbone(x), features[:3])
        torch.testing.assert_close(torch.jit.script(backbone)(x), features[:3])
        *_, last = model.forward_intermediates(x, norm=True, intermediates_only=True)
        if final.dim() == last.dim():  # and not tokens
            torch.testing.assert_close(last.movedim(1, -1), final)


def test_layouts_of_features(micro):
    model, x = micro
    with torch.no_grad():
        features, last, tokens = (
            model.forward_intermediates(x, indices=[0, 1], output_fmt=layout, intermediates_only=True)
            for layout in ("NCHW", "NHWC", "NLC")
        )
    torch.testing.assert_close([feature.movedim(-1, 1) for feature in last], features, rtol=0, atol=0)
    torch.testing.assert_close([feature.flatten(1, -2) for feature in last], tokens, rtol=0, atol=0)
    with pytest.raises(ValueError, match="output_fmt: expected NCHW, NHWC or NLC, got NHCW"):
        model.forward_intermediates(x, output_fmt="NHCW")


@pytest.mark.parametrize("class_token", ["head", "middle", "double"])
def test_class_tokens_beside_features(class_token):
    """Both together are the tokens that the model itself goes on with."""
    model = timm.create_model("test_vim", class_token=class_token).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        final, features = model.forward_intermediates(x, 1, True, norm=True, output_fmt="NLC")
    ((patches, tokens),) = features
    rows = class_token_indices(class_token, 64)
    torch.testing.assert_close(tokens, final[:, rows], rtol=0, atol=0)
    torch.testing.assert_close(patches, remove_class_token(final, class_token), rtol=0, atol=0)


def test_images_do_not_see_each_other(micro):
    model, x = micro
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(image) for image in x.split(1)]))


def test_reset_classifier_keeps_the_pooling(micro):
    model, x = micro
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(5)
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), expected)
        assert model(x).shape == (2, 5)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), expected)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
        assert model(x).dim() > 2


def test_set_input_size(micro):
    """The weights stay, the nominal size changes, and checkpoints of the model itself still fit."""
    model, x = micro
    before = {key: value.shape for key, value in model.state_dict().items() if key != "pos_embed"}
    height, width = x.shape[-2], x.shape[-1] * 2
    model.set_input_size(img_size=(height, width))
    assert before == {key: value.shape for key, value in model.state_dict().items() if key != "pos_embed"}
    assert get_model_input_config(model)["input_size"][-2:] == (height, width)
    x = torch.randn(2, *x.shape[1:-2], height, width)
    with torch.no_grad():
        features = model.forward_intermediates(x, intermediates_only=True)
        assert model(x).isfinite().all()
    channels, reductions = zip(*((info["num_chs"], info["reduction"]) for info in model.feature_info), strict=True)
    check_features(features, channels, reductions, x.shape[1:], 0)


def test_recomputed_activations_give_the_same_gradients(micro):
    model, x = micro
    model.train()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_pruning_leaves_nothing_unused(micro):
    """timm's contract for backbones under distributed training."""
    model, x = micro
    last = len(model.feature_info) - 1
    for indices, prune_norm in (([0], False), ([last], False), (list(range(last + 1)), True)):
        pruned = copy.deepcopy(model).train()
        taken = pruned.prune_intermediate_layers(indices, prune_norm=prune_norm)
        features = pruned.forward_intermediates(x, indices=taken, norm=not prune_norm, intermediates_only=True)
        sum(feature.sum() for feature in features).backward()
        assert not [name for name, parameter in pruned.named_parameters() if parameter.grad is None]
        pruned.reset_classifier(7, "avg")
        assert pruned(x).shape == (2, 7)


def test_bfloat16(micro):
    """Without oneDNN, whose strided convolutions in bfloat16 are wrong for some sizes (PyTorch 2.15, 16 channels)."""
    model, x = micro
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        expected = model(x)
        logits = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_parameter_groups(micro):
    """Every parameter has a depth, and the names without weight decay are parameters."""
    model, _ = micro
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    assert any(name.endswith("A_log") for name in model.no_weight_decay())
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=False))
    assert {name for group in groups.values() for name in group} == names
    assert len(groups) > 3
