"""The engine: precisions, fine-tuning, what is not finite, what cannot be written, what is logged."""

import csv
import errno
import multiprocessing
import os
import signal
from dataclasses import fields

import pytest
import timm
import torch
from digit_folder import write_digits
from runs import TINY, weights

from visionmamba.inference import create_classifier
from visionmamba.training import DataError, TrainConfig, Trainer, TrainingError, checkpoint, engine
from visionmamba.training.checkpoint import WriteError
from visionmamba.training.distributed import World
from visionmamba.training.run import main

SHORT = {**TINY, "epochs": 1, "model": "test_mamba2d"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return str(write_digits(tmp_path_factory.mktemp("digits"), 48, 61))


def _trainer(digits, folder, **changes):
    said = []
    config = TrainConfig(**{**SHORT, "data": digits, "out": str(folder), **changes})
    trainer = Trainer(config, World(0, 1, torch.device("cpu")), said.append)
    trainer.said = said
    return trainer


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions_train(precision, digits, tmp_path):
    row = _trainer(digits, tmp_path, precision=precision, grad_checkpointing=True, epochs=2).run()
    assert row["train_loss"] < 2.4
    assert row["nonfinite"] == 0


@pytest.fixture
def listening():
    """Let Ctrl-C come through, which a process that was started in the background does not hear."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
def test_ctrl_c_saves_first(digits, tmp_path, monkeypatch, capfd):
    take_step = Trainer._take_step

    def interrupted(trainer, *arguments):
        if trainer.step == 1:
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, signal.SIGINT)  # as a terminal does
        return take_step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_take_step", interrupted)
    words = [f"{key}={value}" for key, value in {**SHORT, "scale": [0.7, 1], "data": digits, "out": tmp_path}.items()]
    assert main([*words, "workers=1"]) == 130
    assert capfd.readouterr().err.splitlines()[1:] == [
        "stopping after the next step and saving; Ctrl-C again stops at once",
        f"stopped by SIGINT after step 2; saved {tmp_path / 'checkpoint-2.pt'}",
    ]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert _trainer(digits, tmp_path).resume()


def test_accumulated_passes_make_the_step_of_a_whole_batch(digits, tmp_path):
    for passes in (1, 4):
        _trainer(digits, tmp_path / str(passes), accumulate=passes, opt="sgd", lr=0.1, drop_path=0.0).run()
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    for key in one:
        torch.testing.assert_close(four[key], one[key], rtol=1e-5, atol=1e-5)


def _poison(monkeypatch, steps):
    """Make the loss of some steps not a number, and its gradient with it."""
    loss = engine.Trainer._loss
    monkeypatch.setattr(
        engine.Trainer,
        "_loss",
        lambda trainer, x, y: loss(trainer, x, y) * (float("nan") if trainer.step in steps else 1.0),
    )


def test_nonfinite_steps_are_left_out_and_counted(digits, tmp_path, monkeypatch):
    _poison(monkeypatch, {1})
    trainer = _trainer(digits, tmp_path, model="test_efficient_vmamba", ema_decay=0.9)
    before = {}
    take_step = engine.Trainer._take_step

    def compared(trainer, *arguments):
        state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        result = take_step(trainer, *arguments)
        before[trainer.step] = all(torch.equal(state[key], value) for key, value in trainer.model.state_dict().items())
        return result

    monkeypatch.setattr(engine.Trainer, "_take_step", compared)
    row = trainer.run()
    assert before == {0: False, 1: True, 2: False}  # neither weights nor running statistics
    assert row["nonfinite"] == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert "step 1: the loss or its gradient is not finite; left out (1 so far)" in trainer.said
    assert int(list(csv.DictReader((tmp_path / "log.csv").open()))[-1]["nonfinite"]) == 1


def test_nonfinite_stops_a_run_that_should(digits, tmp_path, monkeypatch):
    _poison(monkeypatch, {0, 1, 2})
    with pytest.raises(TrainingError, match="step 0: the loss or its gradient is not finite; nonfinite=skip"):
        _trainer(digits, tmp_path, nonfinite="stop").run()
    with pytest.raises(TrainingError, match="not finite, 2 times in a row"):
        _trainer(digits, tmp_path, max_nonfinite=1).run()


def test_fine_tuning_with_other_classes_and_a_linear_probe(digits, tmp_path):
    _trainer(digits, tmp_path / "first", ema_decay=0.5).run()
    start = weights(tmp_path / "first")
    few = write_digits(tmp_path / "few", 48, 61)
    for split in ("train", "val"):
        for digit in range(4, 10):
            for path in (few / split / str(digit)).iterdir():
                path.unlink()
    source = str(tmp_path / "first" / "last.safetensors")
    _trainer(str(few), tmp_path / "probe", checkpoint=source, linear_probe=True, batch_size=4).run()
    _trainer(str(few), tmp_path / "tuned", checkpoint=source, batch_size=4).run()
    probe, tuned = weights(tmp_path / "probe"), weights(tmp_path / "tuned")
    assert probe["head.weight"].shape[0] == 4
    assert all(torch.equal(probe[key], start[key]) for key in start if not key.startswith("head."))
    assert not any(torch.equal(tuned[key], start[key]) for key in start if key.endswith("in_proj.weight"))
    saved = create_classifier("test_mamba2d", tmp_path / "tuned" / "last.safetensors")
    assert saved.pretrained_cfg["label_names"] == ["0", "1", "2", "3"]
    assert saved.in_chans == 1


def test_broken_checkpoints_are_named(tmp_path):
    folder, said = checkpoint.CheckpointFolder(tmp_path, keep=3), []
    for step in (1, 2):
        folder.save(step, {"step": step})
    (tmp_path / "checkpoint-2.pt").write_text("no checkpoint")
    assert folder.load(said.append) == {"step": 1}
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'checkpoint-2.pt'} cannot be read and is passed over (")
    (tmp_path / "checkpoint-1.pt").write_bytes((tmp_path / "checkpoint-1.pt").read_bytes()[:200])
    with pytest.raises(checkpoint.ReadError, match="none of its checkpoints can be read; resume=false starts anew"):
        folder.load()


def test_full_disk(digits, tmp_path, monkeypatch, capsys):
    def save(*_arguments):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")  # noqa: B904

    config = [f"{key}={value}" for key, value in SHORT.items() if not isinstance(value, tuple)]
    words = [*config, f"data={digits}", f"out={tmp_path}"]
    assert main(words) == 0
    first = sorted(path.name for path in tmp_path.iterdir())
    kept = (tmp_path / "checkpoint-3.pt").read_bytes()
    monkeypatch.setattr(checkpoint.torch, "save", save)
    capsys.readouterr()
    assert main([*words, "epochs=2"]) == 1
    error = capsys.readouterr().err
    assert "checkpoint-6.pt could not be written (No space left on device); the last complete one is" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == first
    assert (tmp_path / "checkpoint-3.pt").read_bytes() == kept


def test_the_console_tells_how_a_run_goes(digits, tmp_path, capsys):
    config = [f"{key}={value}" for key, value in SHORT.items() if not isinstance(value, tuple)]
    words = [*config, f"data={digits}", f"out={tmp_path}", "log_every=2"]
    assert main(words) == 0
    assert "epoch 1/1, step 2/3: loss " in capsys.readouterr().out
    assert main(words) == 0
    assert (
        f"the run in {tmp_path} has ended, after 3 steps; more epochs or another out go on" in capsys.readouterr().out
    )
    ours = (tmp_path / "best.safetensors").stat().st_mode, (tmp_path / "log.csv").stat().st_mode
    assert ours[0] == ours[1]  # weights are not for their owner alone


def test_help_names_every_key(capsys):
    assert main(["--help"], "How to use it.") == 0
    told = capsys.readouterr().out
    assert told.startswith("How to use it.\n")
    assert all(f"  {item.name}=" in told for item in fields(TrainConfig))
    assert main([], "How to use it.") == 2
    assert capsys.readouterr().err == "How to use it.\n\n--help shows all keys.\n"


def test_what_a_run_needs_is_asked_for_first(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["model=test_vim", "device=cpu", "batch_size=8", "in_chans=1"]
    assert main(words) == 1
    assert capsys.readouterr().err == "error: data: expected the folder of the images, data=FOLDER\n"
    assert not list(tmp_path.iterdir())
    assert main([*words, f"data={digits}", "out=/dev/full"]) == 1
    assert capsys.readouterr().err == "error: out: cannot write to the folder /dev/full (File exists)\n"


def test_full_device_is_a_write_error(tmp_path, monkeypatch):
    if not checkpoint.Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / ".checkpoint-1.pt.tmp").symlink_to("/dev/full")
    monkeypatch.setattr(checkpoint, "replacing", lambda path: _Given(tmp_path / ".checkpoint-1.pt.tmp"))
    with pytest.raises(WriteError, match=r"could not be written .*there is no complete one yet"):
        checkpoint.CheckpointFolder(tmp_path, 1).save(1, {"model": torch.zeros(10000)})


class _Given:
    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self.path

    def __exit__(self, *_error):
        return False


def test_the_last_few_checkpoints_are_kept_and_the_log_goes_on(digits, tmp_path):
    _trainer(digits, tmp_path, epochs=2, save_every=1, keep=2).run()
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["checkpoint-5.pt", "checkpoint-6.pt"]
    _trainer(digits, tmp_path, epochs=3, save_every=1, keep=2, tensorboard=False).run()
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert {"train_loss", "eval_loss", "eval_top1", "eval_top5", "lr", "nonfinite", "seconds"} <= rows[0].keys()


def test_tensorboard(digits, tmp_path):
    pytest.importorskip("tensorboard")
    _trainer(digits, tmp_path, tensorboard=True).run()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_folder_with_another_run_is_not_continued(digits, tmp_path):
    _trainer(digits, tmp_path).run()
    with pytest.raises(TrainingError, match=r"holds a run of another recipe .* give another out"):
        _trainer(digits, tmp_path, model="test_vmamba").run()
    assert _trainer(digits, tmp_path, model="test_vmamba", resume=False).run()["step"] == 3


def test_labels_beyond_the_classes(digits, tmp_path):
    trainer = _trainer(digits, tmp_path)
    trainer.num_classes = 4
    with pytest.raises(DataError, match=r"data: label \d for a model of 4 classes"):
        trainer.run()


def test_the_average_is_of_every_step(digits, tmp_path, monkeypatch):
    trainer = _trainer(digits, tmp_path, ema_decay=0.75)
    history, take_step = [trainer.model.head.weight.detach().clone()], engine.Trainer._take_step

    def remembered(trainer, *arguments):
        result = take_step(trainer, *arguments)
        history.append(trainer.model.head.weight.detach().clone())
        return result

    monkeypatch.setattr(engine.Trainer, "_take_step", remembered)
    trainer.run()
    average = history[0]
    for value in history[1:]:
        average = 0.75 * average + 0.25 * value
    torch.testing.assert_close(weights(tmp_path)["head.weight"], average)
    assert torch.equal(trainer.model.head.weight, history[-1])  # evaluating left the trained weights in place


def test_every_family_has_what_the_engine_needs():
    for name in timm.list_models("test_*", module=["vim", "vmamba", "mamba_nd", "local_vim"]):
        model = timm.create_model(name, device="meta")
        assert hasattr(model, "no_weight_decay")
        assert any(key.rsplit(".", 1)[-1] == "blocks" for key, _ in model.named_modules())
