"""Every config: it builds with the published number of parameters, and its recipe takes a step on a micro backbone."""

import re
from pathlib import Path

import pytest
import torch

_REASON = 'needs OpenMMLab: pip install "visionmamba[openmmlab]"'
for package in ("mmengine", "mmcv", "mmdet", "mmseg"):
    pytest.importorskip(package, reason=_REASON)

from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.optim import build_optim_wrapper  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from test_backbone import detection_batch, image  # noqa: E402

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.rglob("*.py"))]
DIMS = [24, 48, 64, 96]


def load(name):
    """Return a config, its package's registry and its default scope set."""
    config = Config.fromfile(ROOT / name)
    if name.startswith("detection"):
        from mmdet.registry import MODELS
        from mmdet.utils import register_all_modules
    else:
        from mmseg.registry import MODELS
        from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=True)
    return config, MODELS


def segmentation_batch():
    from mmseg.structures import SegDataSample

    samples = []
    for i in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64)))
        labels = torch.randint(0, 150, (1, 64, 64), generator=torch.Generator().manual_seed(i))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=[(image(3, 64, 64, seed=i) * 50 + 120).byte() for i in range(2)], data_samples=samples)


def test_there_are_configs():
    assert {name.split("/")[0] for name in CONFIGS} == {"detection", "segmentation"}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_parameters(name):
    config, models = load(name)
    published = float(re.search(r"([\d.]+) M parameters", (ROOT / name).read_text())[1])
    with torch.device("meta"):
        model = models.build(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_step(name):
    config, models = load(name)
    config.model.backbone.update(model_name="test_vmamba", init_cfg=None)
    if name.startswith("detection"):
        config.model.neck.in_channels, batch = DIMS, detection_batch(with_objects=True)
    else:
        config.model.decode_head.in_channels, config.model.auxiliary_head.in_channels = DIMS, DIMS[2]
        config.model.data_preprocessor.size, batch = (64, 64), segmentation_batch()
    torch.manual_seed(0)
    model = revert_sync_batchnorm(models.build(config.model)).train()
    model.init_weights()
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    decay = {group["weight_decay"] for group in optimizer.param_groups}
    assert decay == {0.0, config.optim_wrapper.optimizer.weight_decay}
    before = model.backbone.model.patch_embed.conv1.weight.clone()
    logs = model.train_step(batch, optimizer)
    assert logs["loss"].isfinite()
    assert not torch.equal(model.backbone.model.patch_embed.conv1.weight, before)
