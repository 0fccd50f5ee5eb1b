"""Training within a given time."""

import math

import pytest
import torch
import torch.nn as nn

pytest.importorskip("mmengine", reason='needs OpenMMLab: pip install "visionmamba[openmmlab]"')
pytest.importorskip("mmcv", reason='needs OpenMMLab: pip install "visionmamba[openmmlab]"')

from mmengine.model import BaseModel
from mmengine.runner import Runner

from visionmamba.openmmlab import hooks


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, inputs, data_samples=None, mode="loss"):
        return dict(loss=self.line(torch.stack(inputs)).mean())


def runner(folder, train_cfg, **hook):
    data = dict(
        dataset=[dict(inputs=torch.ones(1))] * 4,
        sampler=dict(type="InfiniteSampler" if train_cfg["type"].startswith("Iter") else "DefaultSampler"),
        batch_size=2,
        num_workers=0,
    )
    return Runner(
        Line(),
        str(folder),
        train_dataloader=data,
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.5)),
        param_scheduler=dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000)),
        custom_hooks=[dict(type="TimeBudgetHook", **hook)],
        default_scope="mmengine",
        experiment_name=folder.name,
    )


def test_training_ends_in_time_with_the_rate_at_zero(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(hooks.time, "monotonic", lambda: next(clock))
    training = runner(tmp_path, dict(type="IterBasedTrainLoop", max_iters=500), seconds=8, warmup=2)
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
    training = runner(tmp_path / "epochs", dict(type="EpochBasedTrainLoop", max_epochs=1), seconds=8)
    with pytest.raises(TypeError, match="expected an IterBasedTrainLoop, got EpochBasedTrainLoop"):
        training.train()
    with pytest.raises(ValueError, match="seconds: expected more than 0, got 0"):
        hooks.TimeBudgetHook(seconds=0)
