"""``cuda_graph``: the steps of a run without it, here with a stand-in that computes what a graph would replay."""

import csv

import pytest
import torch
from _graph_stand_in import GraphStandIn
from digit_folder import write_digits
from runs import TINY, weights

from visionmamba import cuda_graph
from visionmamba.training import ConfigError, TrainConfig, Trainer, engine
from visionmamba.training.distributed import World, check_world
from visionmamba.training.run import main

CPU = World(0, 1, torch.device("cpu"))
SHORT = {**TINY, "epochs": 2, "model": "test_mamba2d", "drop_path": 0.2, "clip_grad": 1.0}
EVERYTHING = dict(
    model="test_efficient_vmamba", accumulate=2, ema_decay=0.9, mixup=0.8, cutmix=1.0, layer_decay=0.8, save_every=2,
    reprob=0.25,
)  # fmt: skip

PROBE = dict(model="test_efficient_vmamba", linear_probe=True)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(write_digits(tmp_path_factory.mktemp("digits"), 40, 61))  # two batches and a half


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cuda_graph, "_capture", found := GraphStandIn())
    monkeypatch.setattr(engine, "check_world", lambda config, world: None)
    return found


def _run(digits, folder, **changes):
    trainer = Trainer(TrainConfig(**{**SHORT, "data": digits, "out": str(folder), **changes}), CPU)
    trainer.run()
    return trainer


def _same(folder, other):
    mine, theirs = weights(folder), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    rows = [list(csv.DictReader((path / "log.csv").open())) for path in (folder, other)]
    for row in rows[0] + rows[1]:
        row.pop("seconds")
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "changes",
    [EVERYTHING, dict(precision="bf16"), dict(precision="fp16"), PROBE, dict(model="test_mamba3d")],
    ids=["everything", "bf16", "fp16", "linear_probe", "clips"],
)
def test_the_steps_are_those_without_graphs(changes, digits, tmp_path, stand_in):
    _run(digits, tmp_path / "eager", **changes)
    assert stand_in.replays == 0
    trainer = _run(digits, tmp_path / "graphed", cuda_graph=True, **changes)
    assert stand_in.replays == trainer.step * trainer.config.accumulate == 4 * trainer.config.accumulate
    _same(tmp_path / "graphed", tmp_path / "eager")
    passes = 0 if trainer.config.linear_probe else stand_in.replays
    saved = weights(tmp_path / "graphed").items()
    assert all(value == passes for key, value in saved if key.endswith("num_batches_tracked"))


def test_a_resumed_run_repeats_a_whole_one(digits, tmp_path, stand_in):
    _run(digits, tmp_path / "whole", cuda_graph=True, **EVERYTHING)
    for epochs in (1, 2):
        _run(digits, tmp_path / "resumed", cuda_graph=True, **EVERYTHING | {"epochs": epochs})
    _same(tmp_path / "resumed", tmp_path / "whole")


def test_fine_tuning_with_other_classes(digits, tmp_path, stand_in):
    _run(digits, tmp_path / "first", cuda_graph=True, epochs=1)
    few = write_digits(tmp_path / "few", 40, 61)
    for split in ("train", "val"):
        for path in (few / split / "9").iterdir():
            path.unlink()
        (few / split / "9").rmdir()
    for name, graphed in (("eager", False), ("graphed", True)):
        start = str(tmp_path / "first" / "last.safetensors")
        _run(str(few), tmp_path / name, checkpoint=start, cuda_graph=graphed, epochs=1)
    _same(tmp_path / "graphed", tmp_path / "eager")
    assert weights(tmp_path / "graphed")["head.weight"].shape[0] == 9


def test_without_a_cuda_device_it_is_refused(digits, tmp_path, capsys):
    words = ["model=test_vim", "device=cpu", "in_chans=1", "batch_size=8", f"data={digits}", f"out={tmp_path / 'out'}"]
    assert main([*words, "cuda_graph=true"]) == 1
    told = capsys.readouterr().err
    assert told == "error: cuda_graph: expected a CUDA device, and the run is on cpu; leave the key out\n"
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_replayed_is_refused(digits, tmp_path, stand_in, monkeypatch):
    two = World(0, 2, torch.device("cuda", 0))
    check_world(TrainConfig(cuda_graph=True, parallel="ddp"), two)
    with pytest.raises(ConfigError, match="cuda_graph: parallel=fsdp gathers weights anew at every step"):
        check_world(TrainConfig(cuda_graph=True, parallel="fsdp"), two)

    def fail(*_inputs):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(cuda_graph, "_capture", fail)
    message = r"cuda_graph: test_mamba2d cannot be captured \(operation not permitted when stream is capturing\); leave"
    with pytest.raises(ConfigError, match=message):
        _run(digits, tmp_path, cuda_graph=True)
