"""VMamba: the official code's outputs and gradients, its checkpoint layouts, and what timm expects of a model."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from golden import Golden, cases, golden

from visionmamba.layers import OutputNorms
from visionmamba.models import vmamba
from visionmamba.models._checkpoint import CheckpointError
from visionmamba.models.vmamba import checkpoint_filter_fn, official_arguments, official_state_dict

NAMES = timm.list_models(module="vmamba")


def micro(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_vmamba", num_classes=10, **kwargs).eval()


def image(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


def check_against(case: Golden, model: torch.nn.Module) -> None:
    logits = model(case.input)
    logits.float().pow(2).mean().backward()
    case.check_logits(logits)
    case.check_gradients(model, official_state_dict)
    with torch.no_grad():
        _, features = model.forward_intermediates(case.input, output_fmt=case.info["feat_layout"])
        stem = model.patch_embed(case.input)
    for i, feature in enumerate(features):
        case.check_feature(f"feat{i}", feature)
    case.check_feature("stem", stem if case.info["feat_layout"] == "NHWC" else stem.permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", cases("vmamba", "classification", fast=("vmamba_tiny_s1l8", "vmamba_tiny_m2")))
def test_golden(name, tmp_path):
    case = golden(name)
    model = case.create_model(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == case.info["param_count"]
    check_against(case, model)


@pytest.mark.parametrize("name", cases("vmamba", "ablation", fast=("ab_cascade2d",)))
def test_golden_ablation(name, tmp_path):
    case = golden(name)
    arguments = official_arguments(**case.info["ctor"])
    check_against(case, case.create_model(tmp_path, "vmamba_tiny_s1l8", **dict(arguments, drop_path_rate=0.0)))


def test_golden_backbone(tmp_path):
    case = golden("vmamba/vmamba_tiny_s1l8_backbone")
    weights = case.official_weights()
    norms = {key: weights.pop(key) for key in list(weights) if key.startswith("outnorm")}
    classifier = {"classifier.norm": 768, "classifier.head": (1000, 768)}  # an ImageNet checkpoint has them
    for name, shape in classifier.items():
        weights |= {
            f"{name}.weight": torch.ones(shape),
            f"{name}.bias": torch.zeros(shape if name[-1] == "m" else 1000),
        }
    model = case.create_model(tmp_path, weights=weights, features_only=True)
    output_norms = OutputNorms(model.feature_info.channels())
    output_norms.load_state_dict({key.replace("outnorm", "norms."): value for key, value in norms.items()})

    outputs = output_norms(model(case.input))
    sum(output.pow(2).mean() for output in outputs).backward()
    for i, (output, feature) in enumerate(zip(outputs, model(case.input), strict=True)):
        assert output.is_contiguous()
        case.check_feature(f"out{i}", output)
        case.check_feature(f"feat{i}", feature)

    def official(gradients, _):
        ours = {key.removeprefix("0."): value for key, value in gradients.items() if key.startswith("0.")}
        ours = {key.removeprefix("model."): value for key, value in ours.items()}
        theirs = {key.replace("1.norms.", "outnorm"): value for key, value in gradients.items() if key.startswith("1.")}
        return official_state_dict(ours, model.model) | theirs

    case.check_gradients(torch.nn.ModuleList([model, output_norms]), official)


@pytest.mark.parametrize("name", NAMES)
def test_official_layout_round_trip(name):
    """Every parameter has an official name of its own, and comes back from it."""
    model = timm.create_model(name, device="meta", num_classes=10)
    ours = model.state_dict()
    theirs = official_state_dict(ours, model)
    assert len(theirs) == len(ours)
    assert all(key.startswith(("patch_embed.", "layers.", "classifier.")) for key in theirs)
    back = checkpoint_filter_fn(theirs, model)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in ours.items()}


LEGACY = (
    (r"^patch_embed\.0\.", "patch_embed.proj."),
    (r"^patch_embed\.2\.", "patch_embed.norm."),
    (r"(blocks\.\d+)\.norm\.", r"\1.ln_1."),
    (r"\.op\.", ".self_attention."),
    (r"downsample\.norm\.", "downsample.1."),
    (r"downsample\.reduction\.", "downsample.2."),
    (r"^classifier\.", ""),
)


def test_earlier_official_layouts(tmp_path):
    """Names that the authors used before, a numbered downsampling and 1 x 1 convolutions all load."""
    kwargs = dict(depths=(1, 1), dims=16, num_classes=10)
    model = timm.create_model("vanilla_vmamba_tiny", **kwargs)
    official = official_state_dict(model.state_dict(), model)
    legacy = dict(official)
    for pattern, old in LEGACY:
        legacy = {re.sub(pattern, old, key): value for key, value in legacy.items()}
    legacy = {key: value[:, :, None, None] if "in_proj" in key else value for key, value in legacy.items()}
    assert not set(legacy) & set(official)
    path = tmp_path / "legacy.pth"
    torch.save({"model": {f"module.{key}": value for key, value in legacy.items()}}, path)

    overlay = {"file": str(path), "num_classes": 10}
    loaded = timm.create_model("vanilla_vmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_own_checkpoint_round_trip(tmp_path):
    model = micro(pos_embed=True, img_size=64)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth"), "num_classes": 10}
    kwargs = dict(num_classes=10, pos_embed=True, pretrained=True, pretrained_cfg_overlay=overlay)
    loaded = timm.create_model("test_vmamba", img_size=64, **kwargs)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert timm.create_model("test_vmamba", img_size=(32, 96), **kwargs).pos_embed.shape == (1, 8, 24, 24)


def test_misfit_is_named(tmp_path):
    model = micro()
    weights = official_state_dict(model.state_dict(), model)
    weights["layers.0.blocks.0.op.A_logs"] = torch.zeros(7, 1)
    del weights["layers.1.blocks.0.norm.weight"]
    weights["surplus"] = torch.zeros(1)
    torch.save({"model": weights}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as error:
        timm.create_model("test_vmamba", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "bad.pth")})
    for name in ("stages.0.blocks.0.mixer.ssm.A_log", "stages.1.blocks.0.norm1.weight", "surplus"):
        assert name in str(error.value)


def test_official_arguments():
    assert official_arguments("v05_ondwconv3_noz", ssm_ratio=2.0) == dict(ssm_ratio=2.0, gate="none", out_norm="dwconv")
    assert official_arguments("v0", ssm_conv_bias=False, ssm_act_layer="gelu")["ssm_act_layer"] == "silu"
    assert official_arguments("v051d")["path"] == "h,h,h,h"
    for wrong in ("v9", "v05_nosuch"):
        with pytest.raises(ValueError, match="forward_type"):
            official_arguments(wrong)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(out_norm="layer_dwconv"),
        dict(out_norm="softmax"),
        dict(out_norm="sigmoid", out_act=True),
        dict(gate="linear", ssm_init="normal"),
        dict(gate="act", gated_mlp=True, downsample="conv2", patch_norm=False),
        dict(ssm="multi_head", d_state=16, ssm_init="uniform", drop_path_rate=0.1),
        dict(pos_embed=True, img_size=64, downsample="merge", patch_embed="patch"),
    ],
    ids=str,
)
def test_variants_train_and_round_trip(kwargs):
    model = micro(**kwargs)
    back = checkpoint_filter_fn(official_state_dict(model.state_dict(), model), model)
    torch.testing.assert_close(back, model.state_dict(), atol=0, rtol=0)
    model(image(2, 3, 64, 64)).pow(2).mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if "conv" in name)


@pytest.mark.parametrize(
    "name", ["d_state", "gate", "out_norm", "ssm", "ssm_init", "patch_embed", "downsample", "dims"]
)
def test_wrong_argument_is_named(name):
    wrong = dict(dims=[8, 16]).get(name, "nonsense")
    with pytest.raises((ValueError, TypeError), match=name if name != "d_state" else None):
        timm.create_model("test_vmamba", **{name: wrong})


@pytest.mark.parametrize("size", [(8, 8), (28, 36), (33, 70), (100, 4)])
def test_any_image_size(size):
    logits = micro()(image(2, 3, *size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def test_position_embedding_follows_the_image():
    model = micro(pos_embed=True, img_size=32)
    assert model(image(1, 3, 48, 32)).shape == (1, 10)
    before = model(image(1, 3, 48, 64))
    model.set_input_size((48, 64))
    assert model.pos_embed.shape == (1, 12, 16, 24)
    torch.testing.assert_close(model(image(1, 3, 48, 64)), before, atol=1e-6, rtol=0)


def test_features_only():
    model = timm.create_model("test_vmamba", features_only=True, out_indices=(0, 2))
    features = model(image(1, 3, 64, 96))
    assert [tuple(feature.shape) for feature in features] == [(1, 24, 16, 24), (1, 64, 4, 6)]
    assert model.feature_info.reduction() == [4, 16]
    assert not any("stages.3" in name or "head" in name for name, _ in model.named_parameters())


def test_no_weight_decay_names_parameters():
    model = micro(pos_embed=True, img_size=32)
    names = model.no_weight_decay()
    assert names <= {name for name, _ in model.named_parameters()}
    assert {"pos_embed", "stages.0.blocks.0.mixer.ssm.A_log", "stages.0.blocks.0.mixer.ssm.D"} <= names


def test_meta_then_init_is_as_constructed():
    model = timm.create_model("test_vmamba", device="meta", pos_embed=True).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    made = timm.create_model("test_vmamba", pos_embed=True)
    for (name, ours), theirs in zip(model.named_parameters(), made.parameters(), strict=True):
        assert ours.isfinite().all(), name
        if ours.numel() > 1000:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.2, abs=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    model, x = micro(), image(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(model.to(dtype)(x.to(dtype)).float(), expected, atol=0.05, rtol=0.1)


@pytest.mark.parametrize("kwargs", [{}, dict(ssm="cascade"), dict(d_conv=0), dict(ssm="multi_head")], ids=str)
def test_autocast_trains(kwargs):
    model = micro(**kwargs).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(image(2, 3, 32, 32)).float().pow(2).mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_compile_gives_the_eager_result():
    model, x = micro(), image(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    model.zero_grad()
    model(x).pow(2).mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled(x).pow(2).mean().backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_inductor_gives_the_eager_result():
    model, x = micro(), image(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-5, rtol=1e-4)


def test_export_with_dynamic_batch():
    model, x = micro(), image(2, 3, 32, 32)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (1, 5):
        x = image(batch, 3, 32, 32)
        torch.testing.assert_close(exported.module()(x), model(x), atol=1e-5, rtol=1e-5)


def test_export_with_dynamic_image_size():
    model, auto = micro(), torch.export.Dim.AUTO
    exported = torch.export.export(model, (image(2, 3, 64, 96),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    x = image(3, 3, 96, 128)
    torch.testing.assert_close(exported.module()(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(ssm="cascade", gate="act"),
        dict(ssm="multi_head", out_norm="layer_dwconv"),
        dict(patch_embed="patch", downsample="merge", mlp_ratio=0.0, pos_embed=True, img_size=32),
    ],
    ids=str,
)
def test_scripted_variants_give_the_eager_result(kwargs):
    model, x = micro(scriptable=True, **kwargs), image(2, 3, 40, 32)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), atol=1e-5, rtol=1e-5)


def test_published_weights_are_documented():
    for name in NAMES:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.license == "mit" and cfg.paper_ids == "arXiv:2401.10166"
        published = not name.endswith("_m2") and name != "test_vmamba"
        assert bool(cfg.url) == published == bool(cfg.notes)
        if published:
            assert cfg.url.startswith("https://github.com/MzeroMiko/VMamba/releases/download/%23v")
    assert set(NAMES) == set(timm.list_models("*vmamba_*", module="vmamba")) | {"test_vmamba"}
    assert vmamba.default_cfgs["vmamba_tiny_s1l8"].default.notes == ("top1: 82.6",)
