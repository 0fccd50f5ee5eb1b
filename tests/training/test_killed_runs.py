"""A run that is killed and goes on ends with the weights, bit for bit, of one that never was."""

import csv
import os
import random
import signal

import pytest
import torch
from digit_folder import write_digits
from runs import TINY, finish, start, statuses, weights

from visionmamba.training import Interrupted, TrainConfig, Trainer, engine
from visionmamba.training.distributed import World

EVERYTHING = dict(
    TINY, ema_decay=0.9, mixup=0.8, cutmix=1.0, drop_path=0.2, repeats=2, accumulate=2, save_every=2, reprob=0.25,
    auto_augment="rand-m5-mstd0.5", clip_grad=1.0, keep=2,
)  # fmt: skip

TWO_STEPS = 330_000
"""Calls of functions in two steps and the checkpoint that follows them."""


@pytest.fixture
def digits(tmp_path):
    return str(write_digits(tmp_path / "digits", 128, 61))


def _same(folder, other):
    mine, theirs = weights(folder), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    rows = [list(csv.DictReader((path / "log.csv").open())) for path in (folder, other)]
    for row in rows[0] + rows[1]:
        row.pop("seconds")
    assert rows[0] == rows[1]


def _kill_and_go_on(digits, tmp_path, kills, **changes):
    """Kill a run at moments that are the same on every machine: after some steps and some calls of functions."""
    config = dict(EVERYTHING, data=digits, **changes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(dict(config, out=str(whole))))
    steps = max(int(file.stem.split("-")[1]) for file in whole.glob("checkpoint-*.pt"))
    chance = random.Random(kills)
    for kill in range(kills):
        after = chance.randint(1, max(1, 2 * steps // (kills + 3))), chance.randint(1, TWO_STEPS)
        assert statuses(start(dict(config, out=str(killed)), kill_after=after)) == [-signal.SIGKILL]
        if kill == 0:  # the later ones may find little or nothing left to do
            assert not (killed / f"checkpoint-{steps}.pt").exists()
    finish(start(dict(config, out=str(killed))))
    _same(killed, whole)
    assert len(list(killed.glob("checkpoint-*.pt"))) == 2


def test_killed_twice(digits, tmp_path):
    _kill_and_go_on(digits, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_ten_times(digits, tmp_path, workers):
    _kill_and_go_on(digits, tmp_path, 10, epochs=12, workers=workers)


def _run(config):
    trainer = Trainer(TrainConfig(**config), World(0, 1, torch.device("cpu")))
    return trainer, trainer.run


def test_sigterm_saves_in_the_middle_of_an_epoch(digits, tmp_path, monkeypatch):
    config = dict(EVERYTHING, data=digits, save_every=0, epochs=2, workers=1)  # no image seeds this process
    _run(dict(config, out=str(tmp_path / "whole")))[1]()
    take_step = engine.Trainer._take_step

    def terminated(trainer, *arguments):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(trainer, *arguments)

    monkeypatch.setattr(engine.Trainer, "_take_step", terminated)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM after step 4; saved .*checkpoint-4\.pt"):
        _run(dict(config, out=str(tmp_path / "stopped")))[1]()
    assert signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.undo()
    _run(dict(config, out=str(tmp_path / "stopped")))[1]()
    _same(tmp_path / "stopped", tmp_path / "whole")


def test_an_unreadable_checkpoint_is_passed_over(digits, tmp_path):
    config = dict(TINY, data=digits, out=str(tmp_path), epochs=1, save_every=3)
    _run(config)[1]()
    newest = tmp_path / "checkpoint-8.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    (tmp_path / ".checkpoint-9.pt.1.tmp").write_bytes(b"killed while writing")
    trainer, _ = _run(config)
    assert trainer.resume()
    assert trainer.step == 6
    assert not list(tmp_path.glob(".*.tmp"))
