"""The zoo as a whole: which models there are, their published sizes, cfgs and features, and what timm's users do."""

import copy
import pickle
import re
from fnmatch import fnmatch
from functools import partial

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


@pytest.mark.parametrize("indices", [2, (0,), [-1], (0, 2)], ids=str)
def test_features_only_at_chosen_levels(micro, indices):
    model, x = micro
    backbone = timm.create_model(model.pretrained_cfg["architecture"], features_only=True, out_indices=indices).eval()
    backbone.model.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        torch.testing.assert_close(backbone(x), expected)


def test_features_only_of_another_depth():
    """The default levels are those of the model that is built, not of the published one."""
    for name, options, levels in (
        ("test_vmamba", dict(depths=(1, 1), dims=24), 2),
        ("test_efficient_vmamba", dict(depths=(1, 1, 1), dims=24), 3),
        ("test_local_vmamba", dict(depths=(1, 1), dims=24, directions="h,v"), 2),
        ("test_plainmamba", dict(depth=8), 4),
        ("test_mamba2d", dict(depth=8), 4),
    ):
        backbone = timm.create_model(name, features_only=True, device="meta", **options)
        assert len(backbone.feature_info.channels()) == levels
        assert len(backbone(torch.empty(1, 3, 64, 64, device="meta"))) == levels


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


def test_symbolic_trace(micro):
    model, x = micro
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_input_of_another_rank_or_below_a_patch(micro):
    model, x = micro
    for wrong in (x[0], x.unsqueeze(2)):
        with pytest.raises(ValueError, match=re.escape("x: expected (B, channels, ")):
            model(wrong)
    if model.pretrained_cfg["architecture"] in (
        "test_vim",
        "test_efficient_vmamba",
        "test_local_vmamba",
        "test_mamba3d",
    ):
        with pytest.raises(ValueError, match=re.escape("of at least [")):
            model(x[..., :1, :1])
    else:
        assert model(x[..., :1, :1]).shape == (2, 1000)  # these pad


def test_vim_says_how_to_take_another_size():
    x = torch.randn(1, 3, 96, 80)
    with pytest.raises(
        ValueError, match=re.escape("x: expected images of 64 x 64, got 96 x 80; create the model with")
    ):
        timm.create_model("test_vim")(x)
    for options in (dict(img_size=(96, 80)), dict(dynamic_img_size=True)):
        assert timm.create_model("test_vim", **options)(x).shape == (1, 1000)


def test_empty_batch(micro):
    """No images, no logits; and a backward pass through nothing."""
    model, x = micro
    logits = model(x[:0])
    assert logits.shape == (0, 1000)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_nan_stays_in_its_image(micro):
    model, x = micro
    with torch.no_grad():
        poisoned = torch.cat([x[:1], torch.full_like(x[:1], torch.nan)])
        logits = model(poisoned)
        torch.testing.assert_close(logits[:1], model(x[:1]))
    assert logits[1].isnan().all()


def test_copies_compute_the_same(micro):
    """Copied, pickled, and filled after it was made without memory."""
    model, x = micro
    empty = timm.create_model(model.pretrained_cfg["architecture"], device="meta").eval()
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        expected = model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), empty):
            torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)


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


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
def test_checkpoint_of_other_classes(name, tmp_path):
    """Its classifier is loaded where it fits, named where it does not, and left out for a third number."""
    weights = timm.create_model(name, num_classes=7).state_dict()
    torch.save(weights, tmp_path / "seven.pth")
    read = partial(
        timm.create_model, name, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "seven.pth")}
    )
    loaded = read(num_classes=7).state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    with pytest.raises(RuntimeError, match=r"\(7, .*\), expected \(1000, .*It has 7 classes: give num_classes=7\.$"):
        read()
    others = read(num_classes=3).state_dict()
    classifier = [key for key in weights if others[key].shape != weights[key].shape]
    assert classifier == [key for key in weights if key.startswith("head.")]
    assert all(torch.equal(others[key], weights[key]) for key in weights if key not in classifier)


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "plainmamba_l1", "local_vim_tiny_wo_search"])
def test_weights_of_another_size_say_so_in_their_cfg(name):
    """Their position embedding is not interpolated down and, for their own images, up again."""
    overlay = dict(input_size=(3, 384, 320))
    model = timm.create_model(name, device="meta", depth=1, pretrained_cfg_overlay=overlay)
    assert model.pos_embed.numel() == (24 * 20 + (name.startswith("vim"))) * model.embed_dim
    nominal = timm.create_model(name, device="meta", depth=1, img_size=224, pretrained_cfg_overlay=overlay)
    assert nominal.pos_embed.numel() == (14 * 14 + (name.startswith("vim"))) * model.embed_dim


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


RATES = {
    "drop_rate": MICRO,
    "drop_path_rate": MICRO,
    "pos_drop_rate": ("test_local_vim", "test_mamba2d", "test_mamba3d", "test_plainmamba", "test_vim"),
    "proj_drop_rate": ("test_mamba2d", "test_mamba3d", "test_vmamba"),
}


@pytest.mark.parametrize(("rate", "name"), [(rate, name) for rate, names in RATES.items() for name in names])
def test_rates_act_in_training_alone(rate, name):
    torch.manual_seed(0)
    plain, model = timm.create_model(name), timm.create_model(name, **{rate: 0.9})
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, *input_size(model))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=0)
        model.train()
        outputs = []
        for seed in range(3):  # two draws alone may be the same
            torch.manual_seed(seed)
            outputs.append(model(x))
        assert not all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_efficient_vmamba", dict(num_scan_stages=3, expand_ratio=2.0)),
        ("test_plainmamba", dict(num_stem_convs=2, local_conv_layers=(1, 3), mamba_dt_init=False)),
        ("test_mamba3d", dict(tubelet_size=4, fc_norm_eps=1e-5, head_init_std=0.5)),
        ("test_vmamba", dict(mlp_act_layer="relu", patch_norm=False)),
        ("test_vim", dict(rope="stream", rope_reference_size=7, norm_eps=1e-3)),
    ],
    ids=str,
)
def test_options_change_the_model(name, options):
    torch.manual_seed(0)
    plain, model = timm.create_model(name).eval(), timm.create_model(name, **options).eval()
    x = torch.randn(1, *input_size(model))
    shared = {key: value for key, value in plain.state_dict().items() if key in model.state_dict()}
    shared = {key: value for key, value in shared.items() if value.shape == model.state_dict()[key].shape}
    model.load_state_dict(shared, strict=False)
    with torch.no_grad():
        assert model(x).isfinite().all()
        assert not torch.allclose(model(x), plain(x))


def test_vim_pads_to_whole_patches():
    torch.manual_seed(0)
    model = timm.create_model("test_vim", dynamic_img_size=True, dynamic_img_pad=True).eval()
    x = torch.randn(1, 3, 60, 50)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(torch.nn.functional.pad(x, (0, 6, 0, 4))))


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
