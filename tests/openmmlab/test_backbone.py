"""The zoo's models as backbones: in both registries, with the authors' weights, under a detector and a segmentor."""

import sys
from pathlib import Path

import pytest
import timm
import torch

_REASON = 'needs OpenMMLab: pip install "visionmamba[openmmlab]"'
pytest.importorskip("mmengine", reason=_REASON)
pytest.importorskip("mmcv", reason=_REASON)
openmmlab = pytest.importorskip("visionmamba.openmmlab", reason=_REASON, exc_type=ImportError)
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from golden import golden  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

from visionmamba.models import plainmamba, vim  # noqa: E402
from visionmamba.models._checkpoint import CheckpointError  # noqa: E402
from visionmamba.models.vmamba import official_state_dict  # noqa: E402

PLAIN = ["test_vim", "test_local_vim", "test_plainmamba", "test_mamba2d"]
HIERARCHICAL = ["test_vmamba", "test_efficient_vmamba", "test_local_vmamba"]


def build(model_name="test_vmamba", **kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type="VisionMambaBackbone", model_name=model_name, **kwargs))


def image(*size, seed=1):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def perturbed(model):
    """Give every parameter and buffer values of its own, so that one left out or mixed up shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model


def saved(content, folder):
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    return dict(type="Pretrained", checkpoint=str(path))


@pytest.mark.parametrize("package", ["mmdet", "mmseg"])
def test_both_registries_find_it(package):
    registry = pytest.importorskip(f"{package}.registry", reason=f"needs {package}").MODELS
    backbone = registry.build(dict(type="VisionMambaBackbone", model_name="test_vmamba"))
    assert isinstance(backbone, openmmlab.VisionMambaBackbone)
    assert isinstance(
        registry.build(dict(type="VisionMambaFeaturePyramid", channels=8)), openmmlab.VisionMambaFeaturePyramid
    )


@pytest.mark.parametrize("name", HIERARCHICAL + PLAIN)
def test_maps_and_gradients(name):
    """Images of any size; contiguous maps; no parameter without a gradient, which DDP would stumble over."""
    backbone = build(name).train()
    maps = backbone(image(2, 3, 72, 90))
    assert isinstance(maps, tuple)
    assert [feature.shape[1] for feature in maps] == backbone.num_features
    for index, feature in zip(backbone.out_indices, maps, strict=True):
        reduction = backbone.model.feature_info[index]["reduction"]
        assert feature.is_contiguous()
        assert all(abs(size - full / reduction) <= 1 for size, full in zip(feature.shape[2:], (72, 90), strict=True))
    sum(feature.pow(2).mean() for feature in maps).backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["test_vmamba", "test_plainmamba", "test_vim"])
def test_fewer_outputs_prune_the_rest(name):
    whole, backbone = build(name, out_norm=False).eval(), build(name, out_indices=(0, 1), out_norm=False).eval()
    assert len(backbone.stages) == 2
    backbone.load_state_dict({key: whole.state_dict()[key] for key in backbone.state_dict()})
    x = image(1, 3, 64, 64)
    features = whole.model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    torch.testing.assert_close(list(backbone(x)), features)
    backbone.train()
    sum(feature.pow(2).mean() for feature in backbone(x)).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_output_norms_follow_the_authors():
    for name in [*HIERARCHICAL, "test_local_vim", "test_plainmamba"]:
        backbone = build(name)
        assert {norm.eps for norm in backbone.out_norms.norms} == {1e-6 if "plain" in name else 1e-5}
        for feature in backbone.eval()(image(1, 3, 64, 64)):
            assert feature.mean(1).abs().max() < 1e-4
    assert build("test_vim").out_norms is None
    assert build("test_mamba2d").out_norms is None
    assert build("test_vim", out_norm=True).out_norms is not None


def test_default_outputs_of_a_plain_model_are_quarters():
    with torch.device("meta"):
        assert build("plainmamba_l3").out_indices == (8, 17, 26, 35)
        assert build("local_vim_tiny").out_indices == (4, 9, 14, 19)


@pytest.mark.parametrize("name", ["test_efficient_vmamba", "test_plainmamba"])
def test_frozen_stages(name):
    backbone = build(name, frozen_stages=1)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    for _ in range(2):  # train() must freeze again after eval()
        backbone.eval()
        backbone.train()
        optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
        optimizer.zero_grad()
        sum(feature.pow(2).mean() for feature in backbone(image(2, 3, 64, 64))).backward()
        optimizer.step()
    changed = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    stages = "stages" if hasattr(backbone.model, "stages") else "blocks"
    frozen = ("model.patch_embed", "model.pos_embed", f"model.{stages}.0.")
    assert not [key for key in changed if key.startswith(frozen)]
    assert any(key.startswith(f"model.{stages}.1.") for key in changed)
    assert any(key.startswith("out_norms.norms.0") for key in changed)
    assert all(parameter.requires_grad for parameter in build(name).parameters())


def test_norm_eval():
    for norm_eval in (True, False):
        backbone = build("test_efficient_vmamba", norm_eval=norm_eval).train()
        norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        assert norms
        assert {norm.training for norm in norms} == {not norm_eval}
        assert backbone.training


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim", "test_plainmamba"])
def test_with_cp_and_drop_path(name):
    plain, checkpointing = build(name), build(name, with_cp=True)
    gradients = []
    for backbone in (plain, checkpointing):
        sum(feature.pow(2).mean() for feature in backbone(image(1, 3, 64, 64))).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    torch.testing.assert_close(*gradients)
    assert any(getattr(module, "grad_checkpointing", False) for module in checkpointing.modules())
    assert not any(getattr(module, "grad_checkpointing", False) for module in plain.modules())
    rates = [getattr(module, "drop_prob", 0) or 0 for module in build(name, drop_path_rate=0.3).modules()]
    assert max(rates) == pytest.approx(0.3)


# Checkpoints


def check_loaded(backbone, classifier):
    """Assert that a backbone computes a classifier's features (before output norms)."""
    x = image(1, 3, 64, 64)
    expected = classifier.eval().forward_intermediates(x, indices=list(backbone.out_indices), intermediates_only=True)
    actual = backbone.eval().model.forward_intermediates(x, indices=list(backbone.out_indices), intermediates_only=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("name", HIERARCHICAL + PLAIN)
def test_classification_checkpoint(name, official, tmp_path):
    sizes = dict(dynamic_img_size=True) if name == "test_vim" else {}
    classifier = perturbed(timm.create_model(name, num_classes=7, **sizes))
    weights = classifier.state_dict()
    if official:
        module = sys.modules[type(classifier).__module__]
        weights = module.official_state_dict(weights, classifier)
        # what the official layout does not tell apart (LocalVim's A_log of all directions) takes its one value
        classifier.load_state_dict(module.checkpoint_filter_fn(dict(weights), classifier))
    key = "state_dict" if "mamba2d" in name or "plain" in name else "model"
    backbone = build(name, init_cfg=saved({key: weights, "epoch": 3}, tmp_path))
    backbone.init_weights()
    check_loaded(backbone, classifier)
    if name == "test_plainmamba":  # the last output's norm is the classifier's
        torch.testing.assert_close(backbone.out_norms.norms[-1].weight, classifier.norm.weight)


def official_gradients(module, pattern=""):
    """Return the conversion of a backbone's gradients to its authors' names."""

    def official(gradients, backbone):
        norms = {
            pattern.format(*key.removeprefix("out_norms.norms.").split(".")): value
            for key, value in gradients.items()
            if key.startswith("out_norms.")
        }
        ours = {key.removeprefix("model."): value for key, value in gradients.items() if key.startswith("model.")}
        others = {key: value for key, value in gradients.items() if not key.startswith(("model.", "out_norms."))}
        return module.official_state_dict(ours, backbone.model) | norms | others

    return official


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vmamba/vmamba_tiny_s1l8_backbone", marks=pytest.mark.slow),
        "efficient_vmamba/efficient_vmamba_tiny_backbone",
    ],
)
def test_golden_detection_checkpoint(name, tmp_path):
    """The authors' detection backbones, their weights as in a detector's checkpoint, against the official outputs."""
    case = golden(name)
    weights = {f"backbone.{key}": value for key, value in case.official_weights().items()}
    weights["neck.lateral_convs.0.conv.weight"] = torch.zeros(2, 2)
    backbone = build(case.entry["model"], init_cfg=saved({"state_dict": weights, "meta": {}}, tmp_path))
    backbone.init_weights()
    outputs = backbone.eval()(case.input)
    for i, output in enumerate(outputs):
        case.check_feature(f"out{i}", output)
    sum(output.pow(2).mean() for output in outputs).backward()
    module = sys.modules[type(backbone.model).__module__]
    case.check_gradients(backbone, official_gradients(module, "outnorm{}.{}"))


@pytest.mark.slow
def test_golden_vim_detection_backbone(tmp_path):
    """The sum of the last block's two streams, rotated before each block, without a norm."""
    case = golden("vim/vim_det_tiny_backbone_256")
    backbone = build(
        "vim_tiny_patch16_224", out_indices=[23], img_size=256, class_token="", global_pool="avg", rope="stream",
        init_cfg=saved({"state_dict": case.official_weights(tables=True)}, tmp_path),
    )  # fmt: skip
    backbone.init_weights()
    (feature,) = backbone.eval()(case.input)
    case.check_logits(feature)
    feature.pow(2).mean().backward()
    case.check_gradients(backbone, official_gradients(vim))


@pytest.mark.slow
def test_golden_vim_segmentation_backbone(tmp_path):
    """Mixer outputs of four blocks in four strides, by the name and the arguments of the authors' configs."""
    case = golden("vim/vim_seg_tiny_backbone_128")
    flags = {key: value for key, value in case.info["ctor"].items() if key not in ("pretrained", "channels")}
    flags["channels"] = flags.pop("in_chans")
    config = dict(type="VisionMambaSeg", norm_cfg=dict(type="BN"), **flags)
    config["init_cfg"] = saved({"state_dict": case.official_weights(tables=True)}, tmp_path)
    backbone = MODELS.build(config).eval()
    backbone.init_weights()
    maps = backbone(case.input)
    assert [list(feature.shape) for feature in maps] == case.info["output_shapes"]
    logits = torch.cat([feature.flatten() for feature in maps])
    case.check_logits(logits)
    logits.pow(2).mean().backward()
    unused = {"norm_f.weight": torch.full((192,), torch.nan)}  # theirs keeps it, without a gradient
    case.check_gradients(backbone, lambda *args: official_gradients(vim)(*args) | unused)


def test_names_and_arguments_of_old_configs():
    """The authors' arguments build the same functions as the zoo's names."""
    with torch.device("meta"):
        old = MODELS.build(
            dict(
                type="MM_VSSM", out_indices=(0, 1, 2, 3), dims=96, depths=(2, 2, 8, 2), ssm_d_state=1, ssm_ratio=1.0,
                ssm_dt_rank="auto", ssm_conv=3, ssm_conv_bias=False, forward_type="v05_noz", mlp_ratio=4.0,
                downsample_version="v3", patchembed_version="v2", drop_path_rate=0.2, norm_layer="ln2d",
                window_size=7, pretrained="weights.pth",
            )
        )  # fmt: skip
        vanilla = MODELS.build(dict(type="MM_VSSM", dims=96, depths=(2, 2, 9, 2), drop_path_rate=0.2))
        pairs = [
            (old, build("vmamba_tiny_s1l8")),
            (vanilla, build("vanilla_vmamba_tiny")),
            (MODELS.build(dict(type="PlainMambaSeg", arch="L1")), build("plainmamba_l1")),
        ]
    for alias, ours in pairs:
        shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (alias, ours)]
        assert shapes[0] == shapes[1]
    assert old.init_cfg == dict(type="Pretrained", checkpoint="weights.pth")
    with pytest.raises(ValueError, match="arch: expected L1, L2 or L3, got 'L4'"):
        MODELS.build(dict(type="PlainMambaSeg", arch="L4"))


def adapter(**kwargs):
    torch.manual_seed(0)
    config = dict(type="VisionMambaAdapter", model_name="test_plainmamba", patch_size=16, num_heads=4)
    return MODELS.build({**config, "norm_cfg": dict(type="BN"), **kwargs})


def test_adapter():
    """Four strides of images of any size; every parameter trained; the model itself untouched at the start."""
    backbone = adapter().train()
    maps = backbone(image(2, 3, 72, 90))
    assert [tuple(feature.shape[1:]) for feature in maps] == [(48, 24, 24), (48, 12, 12), (48, 6, 6), (48, 3, 3)]
    sum(feature.pow(2).mean() for feature in maps).backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []
    recomputing = adapter(with_cp=True).train()
    sum(feature.pow(2).mean() for feature in recomputing(image(2, 3, 72, 90))).backward()
    torch.testing.assert_close(recomputing.level_embed.grad, backbone.level_embed.grad)
    seen = []
    backbone.eval().model.blocks[-1].register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    x = image(1, 3, 64, 96)
    backbone(x)
    backbone.model(x)
    torch.testing.assert_close(seen[0], seen[1])  # injections start at zero
    for model_name, kwargs in (("test_vmamba", {}), ("test_plainmamba", {"patch_size": 8})):
        with pytest.raises(ValueError, match="model_name: expected a plain model with tokens of stride 16"):
            MODELS.build(dict(type="VisionMambaAdapter", model_name=model_name, **kwargs))


def test_adapter_checkpoints(tmp_path):
    classifier = perturbed(timm.create_model("test_plainmamba", patch_size=16))
    backbone = adapter(init_cfg=saved(classifier.state_dict(), tmp_path))
    before = backbone.level_embed.clone()
    backbone.init_weights()
    torch.testing.assert_close(backbone.model.blocks[1].norm.weight, classifier.blocks[1].norm.weight)
    assert torch.equal(backbone.level_embed, before)
    weights = plainmamba.official_state_dict(classifier.state_dict(), classifier)
    parts = {f"backbone.{key}": value + 1 for key, value in backbone.state_dict().items() if "model." not in key}
    detector = {key: value for key, value in weights.items() if key.startswith("backbone.")} | parts
    loaded = adapter(init_cfg=saved({"state_dict": detector}, tmp_path))
    loaded.init_weights()
    torch.testing.assert_close(loaded.level_embed, before + 1)
    del detector["backbone.interactions.1.injector.gamma"]
    with pytest.raises(CheckpointError, match=r"1 missing \(interactions.1.injector.gamma\)"):
        adapter(init_cfg=saved({"state_dict": detector}, tmp_path)).init_weights()


def test_published_weights(monkeypatch, tmp_path):
    """The word stands for what the model's cfg points at; a class token that the backbone lacks is taken out."""
    from visionmamba.models._builder import WeightsUnavailableError
    from visionmamba.openmmlab import weights as module

    with pytest.raises(WeightsUnavailableError, match="test_vmamba: its authors published no weights"):
        build(init_cfg=dict(type="Pretrained", checkpoint="published")).init_weights()
    classifier = perturbed(timm.create_model("test_vim"))
    path = saved(vim.official_state_dict(classifier.state_dict(), classifier), tmp_path)["checkpoint"]
    cfg = timm.models.get_pretrained_cfg("test_vim")
    cfg.file = path
    monkeypatch.setattr(module, "get_pretrained_cfg", lambda _name: cfg)
    kwargs = dict(class_token="", global_pool="avg", init_cfg=dict(type="Pretrained", checkpoint="published"))
    backbone = build("test_vim", **kwargs)
    backbone.init_weights()
    middle = (classifier.pos_embed.shape[1] - 1) // 2
    expected = torch.cat([classifier.pos_embed[:, :middle], classifier.pos_embed[:, middle + 1 :]], dim=1)
    torch.testing.assert_close(backbone.model.pos_embed, expected)


def test_checkpoint_of_a_detector_of_ours(tmp_path):
    first = perturbed(build())
    weights = {f"backbone.{key}": value for key, value in first.state_dict().items()}
    second = build(init_cfg=saved({"state_dict": {**weights, "rpn_head.rpn_cls.weight": torch.zeros(1)}}, tmp_path))
    second.init_weights()
    torch.testing.assert_close(second.state_dict(), first.state_dict())


def test_plainmamba_downstream_checkpoint(tmp_path):
    """Its authors name output norms by block; the last block's is the classifier's final norm."""
    classifier = perturbed(timm.create_model("test_plainmamba"))
    weights = plainmamba.official_state_dict(classifier.state_dict(), classifier)
    weights = {key: value for key, value in weights.items() if key.startswith("backbone.")}
    norms = {f"backbone.norm_layer{i}.{leaf}": image(48, seed=i) for i in range(3) for leaf in ("weight", "bias")}
    config = saved({"state_dict": weights | norms | {"decode_head.conv_seg.bias": torch.zeros(5)}}, tmp_path)
    backbone = build("test_plainmamba", init_cfg=config)
    backbone.init_weights()
    check_loaded(backbone, classifier)
    for i, norm in enumerate(backbone.out_norms.norms):
        expected = classifier.norm.bias if i == 3 else norms[f"backbone.norm_layer{i}.bias"]
        torch.testing.assert_close(norm.bias, expected)


def test_checkpoint_for_another_image_size(tmp_path):
    """Position embeddings are interpolated to the backbone's own grid."""
    classifier = perturbed(timm.create_model("test_plainmamba"))
    backbone = build("test_plainmamba", img_size=96, init_cfg=saved(classifier.state_dict(), tmp_path))
    backbone.init_weights()
    assert backbone.model.pos_embed.shape[1:3] == (12, 12)
    x = image(1, 3, 96, 96)
    expected = classifier.eval().forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(backbone.eval().model.forward_intermediates(x, intermediates_only=True), expected)


def test_checkpoint_of_another_family_is_an_error(tmp_path):
    config = saved(timm.create_model("test_efficient_vmamba").state_dict(), tmp_path)
    backbone = build(init_cfg=config)
    before = backbone.model.state_dict()["patch_embed.conv1.weight"].clone()
    with pytest.raises(CheckpointError, match=r"test_vmamba: .* does not fit.*It fits test_efficient_vmamba"):
        backbone.init_weights()
    assert torch.equal(backbone.model.patch_embed.conv1.weight, before)


@pytest.mark.parametrize("change", ["missing", pytest.param("unexpected", marks=pytest.mark.slow)])
def test_checkpoint_that_misfits_by_one_key_is_an_error(change, tmp_path):
    weights = timm.create_model("test_vmamba").state_dict()
    if change == "missing":
        del weights["stages.2.blocks.0.norm1.weight"]
    else:
        weights["stages.2.blocks.9.norm1.weight"] = torch.zeros(64)
    with pytest.raises(CheckpointError, match=rf"1 {change} \(stages.2.blocks..\.norm1"):
        build(init_cfg=saved(weights, tmp_path)).init_weights()


def test_output_norms_in_the_checkpoint_must_fit(tmp_path):
    weights = official_state_dict(timm.create_model("test_vmamba").state_dict(), timm.create_model("test_vmamba"))
    weights |= {"outnorm0.weight": torch.ones(24), "outnorm0.bias": torch.zeros(24)}
    config = saved(weights, tmp_path)
    with pytest.raises(CheckpointError, match=r"output norms for \[0\], not for \[1, 2, 3\]"):
        build(init_cfg=config).init_weights()
    with pytest.raises(CheckpointError, match="out_norm is False"):
        build(out_norm=False, init_cfg=config).init_weights()


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(model_name="vmamba_tiny_s1l9"), "model_name: .*vmamba_tiny_s1l8.*got 'vmamba_tiny_s1l9'"),
        (dict(model_name="mamba3d_small_k400"), "model_name: expected a model of images"),
        (dict(model_name="resnet50"), "model_name: expected a model of images"),
        (dict(out_indices=(0, 4)), r"out_indices: expected increasing numbers from 0 to 3, got \(0, 4\)"),
        (dict(out_indices=(-1,)), "out_indices"),
        (dict(out_indices=(1, 0)), "out_indices"),
        (dict(out_indices=()), "out_indices"),
        (dict(frozen_stages=5), "frozen_stages: expected -1 to 4, got 5"),
        (dict(init_cfg=dict(type="Normal", layer="Conv2d")), "init_cfg: expected None or dict"),
    ],
    ids=str,
)
def test_wrong_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        openmmlab.VisionMambaBackbone(**{"model_name": "test_vmamba", **kwargs})


def test_missing_checkpoint():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build(init_cfg=dict(type="Pretrained", checkpoint="nowhere.pth")).init_weights()


def test_feature_pyramid():
    pyramid = MODELS.build(dict(type="VisionMambaFeaturePyramid", channels=8, norm_cfg=dict(type="SyncBN"))).eval()
    assert isinstance(pyramid.pyramid.fpn1[1], torch.nn.SyncBatchNorm)
    maps = [image(1, 8, 4, 6, seed=i) for i in range(4)]
    assert [tuple(m.shape[2:]) for m in pyramid(maps)] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    torch.testing.assert_close(pyramid(maps[:1]), pyramid([maps[0]] * 4))
    with pytest.raises(ValueError, match="expected 1 or 4 maps, got 2"):
        pyramid(maps[:2])


# Under a detector and a segmentor


def detector():
    """mmdet's own Mask R-CNN with few channels and regions on a micro backbone."""
    config_module = pytest.importorskip("mmengine.config")
    config = config_module.Config.fromfile(
        config_module.Config._get_cfg_path("mmdet::_base_/models/mask-rcnn_r50_fpn.py", "x.py")[0]
    ).model
    config.backbone = dict(type="VisionMambaBackbone", model_name="test_vmamba")
    config.neck.update(in_channels=[24, 48, 64, 96], out_channels=16)
    config.rpn_head.update(in_channels=16, feat_channels=16)
    roi = config.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 16
    roi.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=3)
    roi.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=3)
    config.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    config.train_cfg.rcnn.sampler.num = 32
    config.test_cfg.rpn.update(nms_pre=100, max_per_img=50)
    config.test_cfg.rcnn.score_thr = 0.0
    return config


def detection_batch(with_objects):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    samples = []
    for count in (2, 1) if with_objects else (0, 0):
        boxes = torch.tensor([[8.0, 10.0, 60.0, 50.0], [30.0, 30.0, 90.0, 70.0]])[:count]
        masks = torch.zeros(count, 96, 96).numpy().astype("uint8")
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(96, 96), ori_shape=(96, 96), pad_shape=(96, 96), batch_input_shape=(96, 96),
                scale_factor=(1.0, 1.0),
            )
        )  # fmt: skip
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.arange(count), masks=BitmapMasks(masks, height=96, width=96)
        )
        samples.append(sample)
    return dict(inputs=[(image(3, 96, 96, seed=i) * 50 + 120).byte() for i in range(2)], data_samples=samples)


@pytest.mark.parametrize("with_objects", [True, False], ids=["objects", "no_objects"])
def test_mask_rcnn(with_objects):
    registry = pytest.importorskip("mmdet.registry", reason="needs mmdet").MODELS
    pytest.importorskip("mmdet.utils").register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    model = registry.build(detector())
    model.init_weights()
    batch = model.data_preprocessor(detection_batch(with_objects), training=True)
    losses = model.train()(**batch, mode="loss")
    assert {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"} <= set(losses)
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.backbone.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.backbone.out_norms.parameters())
    with torch.no_grad():
        predictions = model.eval()(**model.data_preprocessor(detection_batch(with_objects)), mode="predict")
    for sample in predictions:
        instances = sample.pred_instances
        assert len(instances) > 0
        assert instances.masks.shape == (len(instances), 96, 96)
        assert ((instances.bboxes >= 0) & (instances.bboxes <= 96)).all()


def test_boxes_outside_the_image():
    """Boxes of the truth may reach over the edges or lie beyond them: a finite loss, as for mmdet's own backbones."""
    registry = pytest.importorskip("mmdet.registry", reason="needs mmdet").MODELS
    pytest.importorskip("mmdet.utils").register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    model = registry.build(detector()).train()
    batch = detection_batch(with_objects=True)
    first, second = (sample.gt_instances for sample in batch["data_samples"])
    first.bboxes = torch.tensor([[-30.0, -20.0, 40.0, 130.0], [100.0, 100.0, 140.0, 120.0]])
    second.bboxes = torch.tensor([[90.0, 90.0, 96.5, 200.0]])
    losses = model(**model.data_preprocessor(batch, training=True), mode="loss")
    total, _ = model.parse_losses(losses)
    assert total.isfinite()
    total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.backbone.parameters())


@pytest.mark.parametrize("size", [(0, 64), (64, 0), (2, 2)], ids=str)
@pytest.mark.parametrize(
    "name", ["test_plainmamba", "test_mamba2d", "test_vim", "test_vmamba", "test_efficient_vmamba"]
)
def test_empty_images(name, size):
    """No pixels are an error that says so; less than a patch is padded by plain models, refused by others."""
    backbone = build(name).eval()
    if 0 in size or hasattr(backbone.model, "stages"):
        with pytest.raises(ValueError, match=r"x: expected images \(B, channels, height, width\) of at least"):
            backbone(image(1, 3, *size))
    else:
        assert all(feature.isfinite().all() for feature in backbone(image(1, 3, *size)))


def segmentor(model_name):
    backbone = dict(type="VisionMambaBackbone", model_name=model_name)
    dims = [24, 48, 64, 96]
    neck = None
    if model_name == "test_plainmamba":
        dims = [48] * 4
        neck = dict(type="VisionMambaFeaturePyramid", channels=48)
    head = dict(num_classes=5, norm_cfg=dict(type="BN"), align_corners=False, channels=16, dropout_ratio=0.1)
    return ConfigDict(
        type="EncoderDecoder",
        data_preprocessor=dict(
            type="SegDataPreProcessor", mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4], size=(64, 64)
        ),
        backbone=backbone,
        neck=neck,
        decode_head=dict(type="UPerHead", in_channels=dims, in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), **head),
        auxiliary_head=dict(type="FCNHead", in_channels=dims[2], in_index=2, num_convs=1, **head),
        train_cfg={},
        test_cfg=dict(mode="whole"),
    )


@pytest.mark.parametrize("model_name", ["test_vmamba", "test_plainmamba"])
def test_upernet(model_name):
    registry = pytest.importorskip("mmseg.registry", reason="needs mmseg").MODELS
    pytest.importorskip("mmseg.utils").register_all_modules(init_default_scope=True)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    model = registry.build(segmentor(model_name))
    model.init_weights()

    def batch():
        samples = []
        for i in range(2):
            sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64)))
            labels = torch.randint(0, 5, (1, 64, 64), generator=torch.Generator().manual_seed(i))
            labels[:, :8] = 255 if i else labels[:, :8]  # partly unlabelled
            sample.gt_sem_seg = PixelData(data=labels)
            samples.append(sample)
        return dict(inputs=[(image(3, 64, 64, seed=i) * 50 + 120).byte() for i in range(2)], data_samples=samples)

    losses = model.train()(**model.data_preprocessor(batch(), training=True), mode="loss")
    total, _ = model.parse_losses(losses)
    assert {"decode.loss_ce", "aux.loss_ce"} <= set(losses)
    total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.backbone.out_norms.parameters())
    model.eval()
    with torch.no_grad():
        predictions = model.predict(torch.stack([image(3, 50, 70), image(3, 50, 70, seed=2)]))
    assert [tuple(sample.pred_sem_seg.data.shape) for sample in predictions] == [(1, 50, 70)] * 2
