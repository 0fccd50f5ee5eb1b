"""Every config: counts as published, a training step and a prediction of its recipe on a micro backbone."""

from pathlib import Path

import pytest
import timm
import torch

_REASON = 'needs OpenMMLab: pip install "visionmamba[openmmlab]"'
for package in ("mmengine", "mmcv", "mmdet", "mmseg"):
    pytest.importorskip(package, reason=_REASON)

import yaml  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from test_backbone import detection_batch, image  # noqa: E402

import visionmamba.openmmlab  # noqa: E402, F401
from visionmamba.models.local_vmamba import TINY_DIRECTIONS  # noqa: E402
from visionmamba.openmmlab.complexity import complexity  # noqa: E402
from visionmamba.openmmlab.runner import build_model, load_config  # noqa: E402

CHECKOUT = Path(__file__).parents[2]
ROOT = CHECKOUT / "configs"
EVERY = [str(path.relative_to(ROOT)) for path in sorted(ROOT.rglob("*.py")) if "_base_" not in path.parts]
CONFIGS = [name for name in EVERY if "digit_scenes" not in name]
"""The published recipes; the others train on the digit scenes."""
FAST = (
    "detection/vmamba/mask-rcnn_vmamba-t-s1l8_fpn_1x_coco.py",
    "detection/plainmamba/retinanet_plainmamba-l1_adapter_fpn_1x_coco.py",
    "segmentation/local_mamba/local-vim-t_upernet_8xb2-160k_ade20k-512x512.py",
)
MICRO = {
    "vim_": "test_vim", "vmamba": "test_vmamba", "vanilla": "test_vmamba", "local_vim": "test_local_vim",
    "local_vssm": "test_local_vmamba", "efficient": "test_efficient_vmamba", "plainmamba": "test_plainmamba",
    "mamba2d": "test_mamba2d",
}  # fmt: skip


def each_config(names):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]
    )


def metafiles():
    """Return what the index's metafiles say of each config."""
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    models = [model for name in index["Import"] for model in yaml.safe_load((ROOT / name).read_text())["Models"]]
    return {model["Config"].removeprefix("configs/"): model for model in models}


def segmentation_batch(classes):
    from mmseg.structures import SegDataSample

    samples = []
    for i in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64)))
        labels = torch.randint(0, classes, (1, 64, 64), generator=torch.Generator().manual_seed(i))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=[(image(3, 64, 64, seed=i) * 50 + 120).byte() for i in range(2)], data_samples=samples)


def shrink(config):
    """Put the family's micro model in the backbone's place, and let the detector take few regions."""
    model, backbone = config.model, config.model.backbone
    adapter = backbone.type == "VisionMambaAdapter"
    backbone.model_name = next(micro for start, micro in MICRO.items() if backbone.model_name.startswith(start))
    backbone.init_cfg = None
    layers = {"test_vim": dict(depth=4), "test_local_vim": dict(depth=4, directions="h,v_flip,w2,w2_flip")}
    backbone.update(layers.get(backbone.model_name, {}))
    info = timm.create_model(backbone.model_name, **layers.get(backbone.model_name, {})).feature_info
    dims = [level["num_chs"] for level in info]
    dims = dims if len(set(dims)) > 1 else dims[:1] * 4
    if len(backbone.get("out_indices", [])) == 1:
        backbone.out_indices, dims = [len(info) - 1], dims[-1:]
    if "img_size" in backbone:
        backbone.img_size = 64
    if adapter:
        backbone.update(num_heads=4, patch_size=16)
    neck = model.get("neck")
    if neck and neck.type == "FPN":
        neck.in_channels = dims
    elif neck:
        neck["in_channels" if "in_channels" in neck else "channels"] = dims[-1]
    if "decode_head" in model:
        model.decode_head.in_channels = dims
        model.auxiliary_head.in_channels = dims[model.auxiliary_head.in_index]
        model.data_preprocessor.size = (64, 64)
        return
    if "rpn_proposal" in model.train_cfg:
        model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
        model.test_cfg.rpn.update(nms_pre=100, max_per_img=50)
        stages = model.train_cfg.rcnn if isinstance(model.train_cfg.rcnn, list) else [model.train_cfg.rcnn]
        for stage in stages:
            stage.sampler.num = 32


def test_every_config_is_in_the_index_and_every_entry_has_a_config():
    assert {name.split("/")[0] for name in CONFIGS} == {"detection", "segmentation"}
    models = metafiles()
    assert sorted(models) == CONFIGS
    for name, model in models.items():
        assert model["Name"] == Path(name).stem
        figures = [value for result in model.get("Results", []) for value in result["Metrics"].values()]
        title = (ROOT / name).read_text().split('"""')[1]
        assert all(str(value) in title for value in figures)
        assert bool(figures) == ("not published" not in title)


@each_config(CONFIGS)
def test_counts(name):
    """Within 1 % of the published parameters and operations, or the metafile says why not."""
    model = metafiles()[name]
    metadata = model["Metadata"]
    width, height = map(int, metadata["Input Size"].split("x"))
    counts = complexity(load_config(str(ROOT / name)), (height, width))
    assert counts["parameters"] == metadata["Counted Parameters"]
    assert counts["flops"] == pytest.approx(metadata["Counted FLOPs"], rel=1e-3)
    for kind in ("Parameters", "FLOPs"):
        published, counted = metadata.get(kind), metadata[f"Counted {kind}"]
        if published and abs(counted / published - 1) > 0.01:
            assert len(metadata["Note"]) > 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "published"),
    [
        ("detection/local_mamba/mask-rcnn_local-vmamba-s_fpn_amp-1x_coco.py", (800, 1280), 414e9),
        ("segmentation/local_mamba/local-vmamba-s_upernet_8xb2-160k_ade20k-512x512.py", (512, 2048), 1095e9),
    ],
    ids=["detection", "segmentation"],
)
def test_searched_directions_explain_the_small_local_mambas_operations(name, size, published):
    """The published count lies between those without and with windows of 7, and fits the tiny model's layers."""
    count = {}
    middle = TINY_DIRECTIONS[4:-2]
    layers = (*TINY_DIRECTIONS[:4], *middle, *middle, *middle, *TINY_DIRECTIONS[-2:])
    for kind, directions in (("none", "h,h_flip,v,v_flip"), ("tiny", layers), ("all", "h,h_flip,w7,w7_flip")):
        config = load_config(str(ROOT / name), {"model.backbone.directions": directions})
        count[kind] = complexity(config, size)["flops"]
    assert count["none"] < published < count["all"]
    assert count["tiny"] == pytest.approx(published, rel=0.01)


@each_config(EVERY)
def test_training_step_and_prediction(name):
    config = load_config(str(ROOT / name))
    shrink(config)
    detection = name.startswith("detection")
    classes = None if detection else config.model.decode_head.num_classes
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_model(config)).train()
    model.init_weights()
    optimizer = build_optim_wrapper(model, {**config.optim_wrapper, "type": "OptimWrapper"})
    decay = config.optim_wrapper.optimizer.weight_decay
    assert {group["weight_decay"] for group in optimizer.param_groups} == ({0.0, decay} if name in CONFIGS else {decay})
    parameter = next(p for name, p in model.backbone.named_parameters() if name.endswith("x_proj_weight"))
    before = parameter.detach().clone()
    batch = detection_batch(with_objects=True) if detection else segmentation_batch(classes)
    assert model.train_step(batch, optimizer)["loss"].isfinite()
    assert not torch.equal(parameter, before)
    batch = detection_batch(with_objects=True) if detection else segmentation_batch(classes)
    predictions = model.eval().test_step(batch)
    assert len(predictions) == 2
    for sample in predictions:
        if detection:
            boxes = sample.pred_instances.bboxes
            assert ((boxes >= 0) & (boxes <= 96)).all()
        else:
            assert sample.pred_sem_seg.data.shape == (1, 64, 64)
            assert sample.pred_sem_seg.data.max() < classes


def test_config_by_the_name_of_an_installed_package():
    for name, kind in (("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "MaskRCNN"),
                       ("mmseg::pspnet/pspnet_r50-d8_4xb4-20k_voc12aug-512x512.py", "EncoderDecoder")):  # fmt: skip
        assert load_config(name, {"model.pretrained": None}).model.type == kind
    with pytest.raises(FileNotFoundError, match=r"nothing/here\.py: no such config in the installed mmdet"):
        load_config("mmdet::nothing/here.py")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py: no such config"):
        load_config("nowhere.py")
