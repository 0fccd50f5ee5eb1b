import copy

import pytest
import timm
import torch
import torch.nn as nn
from golden import cases, golden

from visionmamba.layers import BlockPair, SimpleFeaturePyramid
from visionmamba.models._checkpoint import CheckpointError
from visionmamba.models._vim_official import _from_official
from visionmamba.models.vim import (
    Vim,
    VimMixer,
    checkpoint_filter_fn,
    official_arguments,
    official_state_dict,
)

FAST = (
    "vim_d4_bimamba_v1_doublecls_layernorm",
    "vim_d4_nocls_meanpool_bidirectional",
    "vim_d4_rope_clsfirst_nodiv",
    "vim_tiny_patch16_224",
)
DOWNSTREAM_ONLY = (
    "in_chans", "last_layer_process", "note_if_divide_out", "out_feature", "out_indices", "pretrained",
)  # fmt: skip
"""Flags of the authors' detection and segmentation backbones that are no model's."""


def flat_blocks(model):
    for block in model.blocks:
        yield from (block.first, block.second) if isinstance(block, BlockPair) else (block,)


def record_streams(model):
    """Record what the goldens call hidden states and residuals, in raster order turned back where a block reverses."""
    features = {}

    def keep(name, value, flip=False):
        features[name] = value.flip(1) if flip else value

    for i, block in enumerate(flat_blocks(model)):
        flip = block.mixer.ssm.path.startswith("h_flip")
        block.mixer.register_forward_hook(
            lambda _module, _inputs, out, i=i, scale=block.scale, flip=flip: keep(
                f"layers.{i}.hidden_states", out * scale, flip
            )
        )
        block.norm.register_forward_pre_hook(
            lambda _module, inputs, i=i, flip=flip: keep(f"layers.{i}.residual", inputs[0], flip)
        )
    model.patch_embed.register_forward_hook(lambda _module, _inputs, out: keep("patch_embed", out))
    return features


def check_features(case, features):
    for i, name in enumerate(case.arrays["feat_names"]):
        case.check_feature(f"feat{i}", features[str(name)])


def golden_model(case, folder, **kwargs):
    if case.entry["kind"] in ("classification", "conversion"):
        return case.create_model(folder, **kwargs)
    flags = {name: value for name, value in case.info["ctor"].items() if name not in DOWNSTREAM_ONLY}
    weights = {name: value for name, value in case.official_weights(tables=True).items() if "fpn" not in name}
    return case.create_model(folder, "vim_tiny_patch16_224", weights, **official_arguments(**flags), **kwargs)


@pytest.mark.parametrize("name", cases("vim", "classification", "conversion", "ablation", fast=FAST))
def test_golden(name, tmp_path):
    case = golden(name)
    model = golden_model(case, tmp_path)
    features = record_streams(model)
    tokens = model.forward_features(case.input)
    features["pooled"] = model.forward_head(tokens, pre_logits=True)
    logits = model.forward_head(tokens)
    case.check_logits(logits)
    check_features(case, features)
    logits.float().pow(2).mean().backward()
    case.check_gradients(model, official_state_dict)


@pytest.mark.slow
def test_golden_resized_position_embedding(tmp_path):
    case = golden("vim/vim_tiny_stride8_finetuned_from_stride16")
    model = case.create_model(tmp_path)
    case.check_feature("resized_pos_embed", model.pos_embed)
    rows = torch.from_numpy(case.arrays["resized_pos_embed_rownorm"])
    torch.testing.assert_close(model.pos_embed[0].norm(dim=-1).detach(), rows, atol=case.atol, rtol=0)


@pytest.mark.slow
def test_golden_detection_backbone(tmp_path):
    """The sum of hidden state and residual after the last block, without a norm; rotated streams."""
    case = golden("vim/vim_det_tiny_backbone_256")
    model = golden_model(case, tmp_path, num_classes=0, final_norm=False)
    features = record_streams(model)
    (feature,) = model.forward_intermediates(case.input, indices=[23], intermediates_only=True)
    case.check_logits(feature)
    check_features(case, features)
    feature.float().pow(2).mean().backward()
    case.check_gradients(model, official_state_dict)


class SegmentationBackbone(nn.Module):
    def __init__(self, backbone, pyramid):
        super().__init__()
        self.backbone, self.pyramid = backbone, pyramid

    def forward(self, x):
        return self.pyramid(self.backbone.forward_intermediates(x, [5, 11, 17, 23], intermediates_only=True))


@pytest.mark.slow
def test_golden_segmentation_backbone(tmp_path):
    """Mixer outputs of four blocks, resampled to four strides."""
    case = golden("vim/vim_seg_tiny_backbone_128")
    backbone = golden_model(case, tmp_path, num_classes=0, feature_stream="mixer")
    features = record_streams(backbone)
    pyramid = SimpleFeaturePyramid(192).eval()
    pyramid.load_state_dict({key: value for key, value in case.official_weights().items() if key.startswith("fpn")})
    model = SegmentationBackbone(backbone, pyramid)
    maps = model(case.input)
    assert [list(feature.shape) for feature in maps] == case.info["output_shapes"]
    logits = torch.cat([feature.flatten() for feature in maps])
    case.check_logits(logits)
    check_features(case, features)
    logits.float().pow(2).mean().backward()

    def official(gradients, model):
        part = {name.partition(".")[0]: {} for name in gradients}
        for name, value in gradients.items():
            part[name.partition(".")[0]][name.partition(".")[2]] = value
        return {**official_state_dict(part["backbone"], model.backbone), **part["pyramid"]}

    case.check_gradients(model, official)


def test_author_style_names():
    long = "vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    with pytest.warns(UserWarning, match="vim_small_patch16_stride8_224"):
        model = timm.create_model(long, device="meta")
    assert model.patch_embed.grid_size == (27, 27)


FLAGS = [
    {},
    dict(directions="sum", class_token="head", rope="stream"),
    dict(directions="tied", class_token="double", norm="layer", layer_scale=0.1),
    dict(directions="forward", class_token="", global_pool="avg", paired=True, depth=4),
    dict(class_token="", global_pool="last", paired=True, depth=2, pos_embed=False, final_norm=False),
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(map(str, flags.values())) or "published")
def test_official_layout_there_and_back(flags):
    model = timm.create_model("test_vim", **flags)
    state_dict = model.state_dict()
    official = official_state_dict(state_dict, model)
    assert sum(value.numel() for value in official.values()) == sum(value.numel() for value in state_dict.values())
    for convert in (checkpoint_filter_fn, _from_official):
        back = convert(official, model)
        assert back.keys() == state_dict.keys()
        assert all(torch.equal(back[name], value) for name, value in state_dict.items())
    assert checkpoint_filter_fn(state_dict, model).keys() == state_dict.keys()


def build(checkpoint, **kwargs):
    overlay = {"state_dict": checkpoint}
    return timm.create_model("test_vim", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def test_rope_tables_present_or_absent():
    model = timm.create_model("test_vim", rope="stream").eval()
    official = official_state_dict(model.state_dict(), model)
    x = torch.randn(1, 3, 64, 64)
    tables = {"rope.freqs_cos": torch.zeros(64, 64), "rope.freqs_sin": torch.zeros(64, 64)}
    torch.testing.assert_close(build(official, rope="stream")(x), model(x))
    torch.testing.assert_close(build({**official, **tables}, rope="stream")(x), model(x))


def test_checkpoint_of_another_grid():
    small = timm.create_model("test_vim", img_size=32).eval()
    official = official_state_dict(small.state_dict(), small)
    middle = 8
    cls_row = small.pos_embed[:, middle]
    aligned = build(official, pos_embed_resize="aligned")
    assert aligned.pos_embed.shape == (1, 65, 64)
    torch.testing.assert_close(aligned.pos_embed[:, 32], cls_row)
    quirk = build(official)
    torch.testing.assert_close(quirk.pos_embed[:, 0], small.pos_embed[:, 0])
    assert (quirk.pos_embed[:, 32] - cls_row).abs().max() > 1e-3


def test_misfit_names_keys_and_shapes():
    model = timm.create_model("test_vim")
    state_dict = official_state_dict(model.state_dict(), model)
    del state_dict["layers.1.mixer.D_b"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mixer\.ssm\.D"):
        build(state_dict)
    with pytest.raises(CheckpointError, match=r"pos_embed \(1, 12, 64\), expected \(1, 65, 64\)"):
        build({**model.state_dict(), "pos_embed": torch.zeros(1, 12, 64)})


def test_sizes():
    model = timm.create_model("vim_tiny_patch16_stride8_224", device="meta")
    assert model.patch_embed.grid_size == (27, 27) and model.pos_embed.shape[1] == 730
    assert timm.create_model("vim_tiny_patch16_224", device="meta", img_size=384).pos_embed.shape[1] == 577
    assert timm.create_model("vim_tiny_patch16_224", device="meta", img_size=(160, 256)).pos_embed.shape[1] == 161
    assert timm.create_model("test_vim", img_size=28)(torch.zeros(1, 3, 28, 28)).shape == (1, 1000)


@pytest.mark.parametrize("flags", FLAGS[:3], ids=("middle", "head", "double"))
@pytest.mark.parametrize("size", [(32, 72), (67, 41)])
def test_dynamic_size_is_set_input_size(flags, size):
    torch.manual_seed(0)
    dynamic = timm.create_model("test_vim", dynamic_img_size=True, **flags).eval()
    fixed = copy.deepcopy(dynamic)
    fixed.set_input_size(size)
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(dynamic(x), fixed(x))
    maps = fixed.forward_intermediates(x, intermediates_only=True)
    assert maps[0].shape == (2, 64, size[0] // 8, size[1] // 8)
    assert fixed.pretrained_cfg is dynamic.pretrained_cfg or fixed.pos_embed.shape[1] != dynamic.pos_embed.shape[1]


def test_wrong_image_size_is_named():
    with pytest.raises(ValueError, match="expected images of 64 x 64, got 64 x 72"):
        timm.create_model("test_vim")(torch.zeros(1, 3, 64, 72))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("class_token", "tail"), ("directions", "both"), ("norm", "batch"), ("rope", "yes"), ("rope_skip", "last"),
        ("global_pool", "map"), ("feature_stream", "hidden"), ("pos_embed_resize", "nearest"),
    ],
)  # fmt: skip
def test_bad_choices_are_named(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected .*{value}"):
        Vim(device="meta", **{argument: value})


def test_unfit_arguments_are_named():
    with pytest.raises(ValueError, match=r"global_pool: expected .* without a class token"):
        Vim(device="meta", class_token="")
    with pytest.raises(ValueError, match="depth: expected an even number of paired blocks, got 3"):
        Vim(device="meta", depth=3, paired=True)
    with pytest.raises(TypeError, match="bimamba_type"):
        timm.create_model("test_vim", bimamba_type="v2")
    with pytest.raises(ValueError, match="if_random_cls_token_position: not a flag"):
        official_arguments(if_random_cls_token_position=True)


@pytest.mark.parametrize("directions", ["mean", "tied", "forward"])
def test_reversed_mixer_is_the_mixer_of_the_reversed_sequence(directions):
    mixer = VimMixer(16, d_state=4, directions=directions)
    reverse = VimMixer(16, d_state=4, directions=directions, reverse=True)
    reverse.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 11, 16)
    torch.testing.assert_close(reverse(x, [11]), mixer(x.flip(1), [11]).flip(1))


def test_tied_directions_are_separate_ones_on_the_forward_convolution():
    """With a convolution of the present token alone, tying is sharing every parameter but A."""
    tied = VimMixer(16, d_state=4, directions="tied")
    with torch.no_grad():
        tied.ssm.conv_weight[..., :-1] = 0
        tied.ssm.A_log[1] *= 0.5
    separate = VimMixer(16, d_state=4, directions="sum")
    state_dict = separate.state_dict()
    for name, value in tied.state_dict().items():
        state_dict[name] = value.expand_as(state_dict[name])
    separate.load_state_dict(state_dict)
    x = torch.randn(2, 11, 16)
    torch.testing.assert_close(tied(x, [11]), separate(x, [11]))


def test_pools_without_a_class_token():
    model = timm.create_model("test_vim", class_token="", global_pool="max", num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    torch.testing.assert_close(model(x), model.head(tokens).amax(1))  # the authors' order: classify, then pool
    for pool, expected in (("avg", tokens.mean(1)), ("last", tokens[:, -1]), ("", tokens)):
        model.reset_classifier(0, pool)
        torch.testing.assert_close(model(x), expected)


def test_average_of_patches_leaves_out_the_class_token():
    model = timm.create_model("test_vim", global_pool="avg", num_classes=0).eval()
    x = torch.randn(1, 3, 64, 64)
    tokens = model.forward_features(x)[0]
    torch.testing.assert_close(model(x)[0], torch.cat([tokens[:32], tokens[33:]]).mean(0))


def test_initialisation():
    published = timm.create_model("test_vim")
    corrected = timm.create_model("test_vim", init_backward_dt=True)
    for block, fixed in zip(published.blocks, corrected.blocks, strict=True):
        steps = nn.functional.softplus(block.mixer.ssm.dt_proj_bias)
        assert steps[0].max() <= 0.1 + 1e-6 and steps[0].min() >= 1e-4
        assert (block.mixer.ssm.dt_proj_bias[1] == 0).all()  # published models start with steps of 0.69 backwards
        assert nn.functional.softplus(fixed.mixer.ssm.dt_proj_bias).max() <= 0.1 + 1e-6
        bound = (128 * 3) ** -0.5  # Kaiming uniform over depth ** 0.5
        assert 0.9 * bound < block.mixer.out_proj.weight.abs().max() <= bound
    assert published.head.weight.std().sub(0.02).abs() < 2e-3 and not published.head.bias.any()


def test_initialisation_after_meta():
    model = timm.create_model("test_vim", device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_no_weight_decay():
    model = timm.create_model("test_vim", directions="mean", layer_scale=0.1)
    names = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "blocks.0.mixer.ssm.A_log", "blocks.2.mixer.ssm.dt_proj_bias"} <= names
    decayed = [name for name, parameter in model.named_parameters() if name not in names and parameter.dim() > 1]
    assert {name.rsplit(".", 1)[-1] for name in decayed} == {
        "weight", "conv_weight", "x_proj_weight", "dt_proj_weight",
    }  # fmt: skip


def test_feature_streams():
    x = torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    model = timm.create_model("test_vim").eval()
    recorded = record_streams(model)
    features = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
    for i, (patches, tokens) in enumerate(features):
        whole = torch.cat([patches[:, :32], tokens, patches[:, 32:]], dim=1)
        expected = recorded[f"layers.{i}.residual"] + recorded[f"layers.{i}.hidden_states"]
        torch.testing.assert_close(whole, expected)
    model.feature_stream = "mixer"
    mixed = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True)
    for i, (patches, tokens) in enumerate(mixed):
        whole = torch.cat([patches[:, :32], tokens, patches[:, 32:]], dim=1)
        torch.testing.assert_close(whole, recorded[f"layers.{i}.hidden_states"])


@pytest.mark.parametrize("rope", ["stream", "mixer"])
def test_rotated_features_are_what_the_next_norm_sees(rope):
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model("test_vim", rope=rope, class_token="head").eval()
    recorded = record_streams(model)
    features = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    for i in (0, 1):
        torch.testing.assert_close(features[i], recorded[f"layers.{i + 1}.residual"][:, 1:])
    last = recorded["layers.2.residual"] + recorded["layers.2.hidden_states"]
    torch.testing.assert_close(features[2], last[:, 1:])


@pytest.mark.parametrize("stream", ["residual", "mixer"])
def test_checkpointing_changes_nothing(stream):
    torch.manual_seed(0)
    model = timm.create_model("test_vim", feature_stream=stream, drop_path_rate=0.0)
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        tokens, features = model.forward_intermediates(x)
        (tokens.square().mean() + sum(feature.square().mean() for feature in features)).backward()
        gradients.append([parameter.grad for parameter in model.blocks.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bfloat16_keeps_a_float32_stream():
    model = timm.create_model("test_vim").to(torch.bfloat16).eval()
    streams = record_streams(model)
    x = torch.randn(1, 3, 64, 64).bfloat16()
    assert model(x).dtype == torch.bfloat16
    assert streams["layers.2.residual"].dtype == torch.float32
    features = model.forward_intermediates(x, intermediates_only=True)
    assert {feature.dtype for feature in features} == {torch.bfloat16}
    narrow = timm.create_model("test_vim", residual_in_float32=False).to(torch.bfloat16)
    streams = record_streams(narrow)
    narrow(x)
    assert streams["layers.2.residual"].dtype == torch.bfloat16


def test_float64_is_float64_throughout():
    model = timm.create_model("test_vim", rope="stream").eval()
    x = torch.randn(1, 3, 64, 64)
    single = model(x)
    double = model.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single, double.float(), atol=2e-5, rtol=0)


def test_autocast_is_close():
    model = timm.create_model("test_vim").eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(x)
    torch.testing.assert_close(actual.float(), expected, atol=0.03, rtol=0.05)


def test_stochastic_depth_trains():
    model = timm.create_model("test_vim", drop_path_rate=0.5, num_classes=5).train()
    assert [block.drop_path.drop_prob for block in list(model.blocks)[1:]] == [0.25, 0.5]
    model(torch.randn(4, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize("flags", [{}, dict(rope="stream", depth=1)], ids=("published", "rope"))
def test_compile_without_graph_breaks(flags):
    torch.manual_seed(0)
    model = timm.create_model("test_vim", **flags).eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    model.train()
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        run(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_compile_with_inductor():
    torch.manual_seed(0)
    model = timm.create_model("test_vim").eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5, rtol=1e-4)


def test_export_with_a_dynamic_batch():
    torch.manual_seed(0)
    model = timm.create_model("test_vim").eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(x), model(x))


def test_pretrained_weights_fit_other_channels_classes_and_feature_extraction():
    model = timm.create_model("test_vim").eval()
    official = official_state_dict(model.state_dict(), model)
    grey = build(official, in_chans=1, num_classes=10)
    torch.testing.assert_close(grey.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True))
    assert grey(torch.zeros(1, 1, 64, 64)).shape == (1, 10)
    x = torch.randn(1, 3, 64, 64)
    features = build(official, features_only=True, out_indices=(0, 2))(x)
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for feature, other in zip(features, expected, strict=True):
        assert feature.shape == (1, 64, 8, 8)
        torch.testing.assert_close(feature, other)


@pytest.mark.parametrize(("rope_skip", "still"), [("first", [0, 1]), ("class", [0, 32])])
def test_tokens_that_rope_skips(rope_skip, still):
    """The skipped token, and the patch at the origin, whose angles are 0."""
    model = timm.create_model("test_vim", rope="stream", rope_skip=rope_skip, depth=1).eval()
    rotated = record_streams(model)
    x = torch.randn(1, 3, 64, 64)
    model(x)
    plain = timm.create_model("test_vim", depth=1).eval()
    plain.load_state_dict(model.state_dict())
    unrotated = record_streams(plain)
    plain(x)
    moved = (rotated["layers.0.residual"] - unrotated["layers.0.residual"]).abs().amax(-1)[0] > 1e-6
    assert (~moved).nonzero().flatten().tolist() == still


def test_a_stream_without_final_norm_leaves_in_the_parameters_dtype():
    model = timm.create_model("test_vim", final_norm=False, class_token="", global_pool="avg").bfloat16().eval()
    x = torch.randn(1, 3, 64, 64).bfloat16()
    assert model.forward_features(x).dtype == torch.bfloat16
    assert model(x).shape == (1, 1000)
