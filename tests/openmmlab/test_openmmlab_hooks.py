"""Training within a given time, classes before their background, and backbones as CUDA graphs."""

import math

import pytest
import torch
import torch.nn as nn

pytest.importorskip("mmengine", reason='needs OpenMMLab: pip install "visionmamba[openmmlab]"')
pytest.importorskip("mmcv", reason='needs OpenMMLab: pip install "visionmamba[openmmlab]"')

from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner

from visionmamba.openmmlab import hooks


class Head(nn.Module):
    """What of mmsegmentation's heads a hook sees."""

    num_classes = 3

    def __init__(self, weighted=True):
        super().__init__()
        self.loss_decode = nn.Identity()
        if weighted:
            self.loss_decode.class_weight = None


class Line(BaseModel):
    def __init__(self, weighted=True):
        super().__init__()
        self.backbone = self.line = nn.Linear(1, 1)
        self.decode_head = Head()
        self.auxiliary_head = nn.ModuleList([Head(), Head(weighted)])

    def forward(self, inputs, data_samples=None, mode="loss"):
        return dict(loss=self.line(torch.stack(inputs)).mean())


ITERATIONS = dict(type="IterBasedTrainLoop", max_iters=8)
TIME = dict(type="TimeBudgetHook", seconds=8)


def runner(folder, train_cfg, hook, model=None, **options):
    data = dict(
        dataset=[dict(inputs=torch.ones(1))] * 4,
        sampler=dict(
            type="InfiniteSampler" if train_cfg["type"].startswith("Iter") else "DefaultSampler", shuffle=False
        ),
        batch_size=2,
        num_workers=0,
    )
    return Runner(
        model or Line(),
        str(folder),
        train_dataloader=data,
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.5), **options),
        param_scheduler=dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000)),
        custom_hooks=[hook],
        default_scope="mmengine",
        experiment_name=folder.name,
    )


def test_training_ends_in_time_with_the_rate_at_zero(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(hooks.time, "monotonic", lambda: next(clock))
    training = runner(tmp_path, dict(type="IterBasedTrainLoop", max_iters=500), TIME | dict(warmup=2))
    rates = []
    before = hooks.TimeBudgetHook.before_train_iter

    def record(self, runner, batch_idx, data_batch=None):
        before(self, runner, batch_idx, data_batch)
        rates.append(runner.optim_wrapper.param_groups[0]["lr"])

    monkeypatch.setattr(hooks.TimeBudgetHook, "before_train_iter", record)
    training.train()
    assert training.iter == 8
    assert (tmp_path / "iter_8.pth").is_file()
    cosine = [0.25 * (1 + math.cos(math.pi * i / 8)) for i in range(1, 9)]
    assert rates == pytest.approx([cosine[0] / 2, *cosine[1:]], abs=1e-6)
    assert rates[-1] == 0


def test_time_budget_refuses_epochs_and_no_time(tmp_path):
    training = runner(tmp_path / "epochs", dict(type="EpochBasedTrainLoop", max_epochs=1), TIME)
    with pytest.raises(TypeError, match="expected an IterBasedTrainLoop, got EpochBasedTrainLoop"):
        training.train()
    with pytest.raises(ValueError, match="seconds: expected more than 0, got 0"):
        hooks.TimeBudgetHook(seconds=0)


def test_the_background_counts_little_at_first(tmp_path, monkeypatch):
    hook = dict(type="BackgroundWeightHook", start=0.01, begin=0.25, end=0.75)
    training = runner(tmp_path, ITERATIONS, hook)
    weights = []
    before = hooks.BackgroundWeightHook.before_train_iter

    def record(self, runner, batch_idx, data_batch=None):
        before(self, runner, batch_idx, data_batch)
        heads = [runner.model.decode_head, *runner.model.auxiliary_head]
        assert all(head.loss_decode.class_weight == heads[0].loss_decode.class_weight for head in heads)
        weights.append(heads[0].loss_decode.class_weight)

    monkeypatch.setattr(hooks.BackgroundWeightHook, "before_train_iter", record)
    training.train()
    expected = [0.01, 0.01, 0.01, 0.01**0.75, 0.01**0.5, 0.01**0.25]
    assert weights[:6] == [[pytest.approx(weight), 1.0, 1.0] for weight in expected]
    assert weights[6:] == [None, None]


def test_the_background_follows_the_time_where_that_is_given(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(hooks.time, "monotonic", lambda: next(clock))
    training = runner(tmp_path, ITERATIONS | dict(max_iters=500), TIME)
    training.register_custom_hooks([dict(type="BackgroundWeightHook", begin=0.0, end=1.0)])
    training.train()
    assert training.iter == 4  # two readings of the clock an iteration
    assert training.model.decode_head.loss_decode.class_weight == [pytest.approx(0.01 ** (1 / 8)), 1.0, 1.0]


def test_background_weight_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="start: expected a weight above 0, got 0"):
        hooks.BackgroundWeightHook(start=0)
    with pytest.raises(ValueError, match=r"expected 0 <= begin < end <= 1, got 0\.5 and 0\.5"):
        hooks.BackgroundWeightHook(begin=0.5, end=0.5)
    training = runner(tmp_path, ITERATIONS, dict(type="BackgroundWeightHook"), Line(weighted=False))
    with pytest.raises(TypeError, match="expected heads of CrossEntropyLoss, got Identity"):
        training.train()


def test_no_graph_without_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    training = runner(tmp_path / "cpu", ITERATIONS, dict(type="CudaGraphHook"))
    training.train()
    assert training.iter == 8
    assert "no CUDA device, training without graphs" in next((tmp_path / "cpu").glob("*/*.log")).read_text()


class Classifier(BaseModel):
    """A backbone and a linear layer, on random images."""

    def __init__(self):
        super().__init__(data_preprocessor=dict(type="ImgDataPreprocessor"))
        torch.manual_seed(0)
        self.backbone = MODELS.build(dict(type="VisionMambaBackbone", model_name="test_vmamba", drop_path_rate=0.0))
        self.head = nn.Linear(96, 10)
        self.losses = []

    def forward(self, inputs, data_samples=None, mode="loss"):
        logits = self.head(self.backbone(inputs)[-1].mean((2, 3)))
        loss = nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
        self.losses.append(loss.item())
        return dict(loss=loss)


@pytest.mark.gpu
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_a_graph_trains_as_the_backbone_does(tmp_path, mixed, passes):
    import visionmamba.openmmlab  # noqa: F401  (registers the backbone)

    options = dict(type="AmpOptimWrapper", dtype="bfloat16") if mixed else {}
    options["accumulative_counts"] = passes
    losses = []
    for name in ("CudaGraphHook", "EmptyCacheHook"):
        model = Classifier()
        training = runner(tmp_path / name, ITERATIONS, dict(type=name), model, **options)
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        training.train_dataloader.dataset[:] = [dict(inputs=image) for image in images]
        training.train()
        losses.append(model.losses)
    assert losses[1][-1] < losses[1][0] - 0.01
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if mixed else 1e-4)
