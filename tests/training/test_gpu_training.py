"""Training on a GPU: resumed runs and those that replay CUDA graphs take the steps of others, bit by bit."""

import csv
import signal

import pytest
import torch
from digit_folder import write_digits
from runs import TINY, finish, start, start_in_turn, statuses, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


EVERYTHING = dict(
    model="test_efficient_vmamba", accumulate=2, ema_decay=0.9, mixup=0.8, cutmix=1.0, layer_decay=0.8, clip_grad=1.0,
)  # fmt: skip


def _config(folder, **changes):
    common = dict(sched="constant", warmup_epochs=0, ema_decay=0.8, drop_path=0.2, device="cuda")
    return TINY | common | dict(data=str(write_digits(folder / "digits", 64, 61))) | changes


def _same(folder, other):
    mine, theirs = weights(folder), weights(other)
    differences = {key: (mine[key] - value).abs().max().item() for key, value in theirs.items()}
    assert max(differences.values()) == 0, (
        f"largest differences: {sorted(differences.items(), key=lambda x: -x[1])[:3]}"
    )
    rows = [list(csv.DictReader((path / "log.csv").open())) for path in (folder, other)]
    for row in rows[0] + rows[1]:
        row.pop("seconds")
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "changes",
    [
        EVERYTHING,
        dict(model="test_vim", precision="bf16"),
        dict(model="test_vmamba", precision="fp16"),
        dict(model="test_vmamba", precision="bf16", workers=1),
        dict(model="test_plainmamba"),
        dict(model="test_mamba3d", precision="bf16", linear_probe=True),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_graphs_take_the_same_steps(changes, tmp_path):
    config = _config(tmp_path, epochs=2, **changes)
    runs = [dict(config, out=str(tmp_path / name), cuda_graph=name == "graphed") for name in ("eager", "graphed")]
    finish(start_in_turn(runs))
    _same(tmp_path / "graphed", tmp_path / "eager")


def test_a_killed_run_with_graphs_repeats_a_whole_one(tmp_path):
    config = _config(tmp_path, epochs=2, save_every=2, cuda_graph=True, **EVERYTHING)
    whole, killed = (dict(config, out=str(tmp_path / name)) for name in ("whole", "killed"))
    assert statuses(start(killed, kill_after=(3, 1000))) == [-signal.SIGKILL]
    assert [path.name for path in (tmp_path / "killed").glob("*.pt")] == ["checkpoint-2.pt"]
    finish(start_in_turn([killed, whole]))
    _same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    "model, precision, cuda_graph",
    [
        ("test_vmamba", "fp32", False),
        ("test_vmamba", "fp16", False),
        ("test_vim", "fp32", False),
        ("test_vim", "bf16", False),
        ("test_vmamba", "fp16", True),
        ("test_vim", "bf16", True),
    ],
)
def test_a_resumed_run_repeats_a_whole_one(model, precision, cuda_graph, tmp_path):
    """In one process, which a device is slow to take up; tests on the CPU resume in another."""
    config = _config(tmp_path, model=model, precision=precision, cuda_graph=cuda_graph)
    resumed = dict(config, out=str(tmp_path / "resumed"))
    finish(
        start_in_turn(
            [dict(config, out=str(tmp_path / "whole"), epochs=2), {**resumed, "epochs": 1}, {**resumed, "epochs": 2}]
        )
    )
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert all(torch.isfinite(value).all() for value in whole.values())
