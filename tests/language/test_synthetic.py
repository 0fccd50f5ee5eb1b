"""The synthetic tasks: what the generators promise, and short versions of the papers' experiments."""

import json
from dataclasses import replace

import pytest
import torch

from visionmamba.language import training
from visionmamba.language.synthetic import IGNORE, TASKS, accuracy, task
from visionmamba.language.training import Trainer, TrainingRun, create_model, evaluate, parameter_groups, train


def _make(name, batch=16, seed=0, **options):
    return task(name, **options)(batch, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["copying", "selective_copying"])
def test_copying(name):
    inputs, targets = _make(name, length=40, num_tokens=5, vocab_size=9)
    assert inputs.shape == targets.shape == (16, 45)
    assert (inputs[:, 40:] == 1).all() and (targets[:, :40] == IGNORE).all()
    for row, answer in zip(inputs[:, :40], targets[:, 40:], strict=True):
        assert torch.equal(row[row > 1], answer)
        assert (row == 0).sum() == 35
    places = inputs[:, :40] > 1
    assert bool(places[:, :5].all()) == (name == "copying")


def test_induction_heads():
    inputs, targets = _make("induction_heads", length=30, vocab_size=7)
    assert (targets[:, :-1] == IGNORE).all() and (inputs[:, -1] == 7).all()
    for row, answer in zip(inputs, targets[:, -1], strict=True):
        (first, last) = (row == 7).nonzero().squeeze(1)
        assert last == 29 and first < 28 and row[first + 1] == answer < 7


def test_mqar():
    inputs, targets = _make("mqar", length=64, num_pairs=8, vocab_size=40)
    for row, answers in zip(inputs, targets, strict=True):
        stored = dict(zip(row[0:16:2].tolist(), row[1:16:2].tolist(), strict=True))
        asked = (answers != IGNORE).nonzero().squeeze(1)
        assert len(stored) == len(set(stored.values())) == len(asked) == 8
        assert all(0 < key < 20 <= value for key, value in stored.items())
        assert asked.min() >= 16
        assert {int(row[i]): int(answers[i]) for i in asked} == stored


@pytest.mark.parametrize("name", TASKS)
def test_generators_are_reproducible(name):
    options = {"mqar": {"length": 64, "num_pairs": 8}}.get(name, {"length": 32})
    first, again, other = (_make(name, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("selective_copying", {"length": 3, "num_tokens": 4}, "length: expected at least 4 for 4 tokens, got 3"),
        ("mqar", {"length": 30, "num_pairs": 8}, "length: expected at least 32 for 8 pairs and queries, got 30"),
        ("induction_heads", {"length": 3}, "length: expected at least 4"),
        ("sorting", {}, "task: expected one of copying, selective_copying, induction_heads, mqar, got 'sorting'"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        _make(name, **options)


def test_accuracy_counts_what_is_asked():
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0, 1]]), 3).float()
    assert accuracy(logits, torch.tensor([[IGNORE, 2, 1, 1]])) == pytest.approx(2 / 3)


def test_weight_decay_spares_the_state_space():
    model = create_model(TrainingRun(d_model=16))
    decayed, others = parameter_groups(model, 0.1)
    mixer = model.backbone.layers[0].mixer
    spared = {id(p) for p in others["params"]}
    assert all(id(p) in spared for p in (mixer.A_log, mixer.D, mixer.dt_proj.bias, model.backbone.norm_f.weight))
    assert any(p is mixer.in_proj.weight for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_log(tmp_path):
    run = TrainingRun(options={"length": 8, "num_tokens": 2}, d_model=16, n_layer=1, steps=4, batch=4, eval_every=2)
    _, entries = train(run, log=tmp_path / "logs" / "run.jsonl")
    first, *lines = [json.loads(line) for line in (tmp_path / "logs" / "run.jsonl").read_text().splitlines()]
    assert first["run"]["options"] == {"length": 8, "num_tokens": 2}
    assert lines == entries and [entry["step"] for entry in lines] == [2, 4]


def test_learning_rate_rises_stays_and_falls():
    run = TrainingRun(steps=100, lr=2.0, warmup=0.1)
    rates = [run.learning_rate(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and rates[9:81] == [2.0] * 72
    assert rates[-1] == pytest.approx(0.1) and rates[90] == pytest.approx(1.0)


_STAGES = TrainingRun(
    options={"length": 12, "num_tokens": 2}, curriculum=({"length": 4}, {"length": 8}), advance_at=0.0, d_model=16,
    n_layer=1, steps=6, batch=4, eval_every=2,
)  # fmt: skip


def test_curriculum_takes_the_next_stage_once_one_is_learnt():
    trainer, shapes = Trainer(_STAGES), []
    trainer.model.backbone.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[1]))
    entries = [trainer.advance() for _ in range(3)]
    assert shapes == [6] * 3 + [10] * 3 + [14] * 3  # two steps and an evaluation each, with two tokens to answer
    assert [entry.get("length") for entry in entries] == [4, 8, None]
    assert trainer.finished
    slow = Trainer(replace(_STAGES, advance_at=1.1, steps=16))
    assert [slow.advance().get("length") for _ in range(5)] == [4, 4, 8, 8, None]  # half of the steps, shared equally


@pytest.mark.parametrize("eps, least, most", [(1e-8, 0.0, 1e-4), (1e-20, 5e-3, 3e-2)])
def test_a_small_eps_learns_from_vanishing_gradients(eps, least, most):
    trainer = Trainer(replace(_STAGES, eps=eps, lr=1e-2, warmup=0.0, weight_decay=0.0))
    weight = trainer.model.backbone.layers[0].mixer.in_proj.weight
    weight.register_hook(lambda gradient: 1e-12 * gradient / gradient.abs().max())
    before = weight.detach().clone()
    trainer.advance()
    assert least < (weight.detach() - before).abs().max() < most


@pytest.mark.parametrize("smoothing, least, most", [(0.0, 0.0, 1e-9), (0.1, 1e-3, 1.0)])
def test_smoothed_labels_keep_asking_of_certain_answers(smoothing, least, most, monkeypatch):
    trainer = Trainer(replace(_STAGES, label_smoothing=smoothing))
    inputs, places, answers = next(trainer._data)
    certain = (40.0 * torch.nn.functional.one_hot(answers, 16)).requires_grad_()
    monkeypatch.setattr(training, "_asked_logits", lambda *_: certain)
    trainer._optimise(inputs, places, answers)
    assert least < certain.grad.abs().max() < most


def test_resumed_run_equals_a_whole_one(tmp_path):
    run = replace(_STAGES, options={"length": 8, "num_tokens": 2}, curriculum=({"length": 4},))
    whole, entries = train(run)
    for _ in range(3):
        model, last = train(run, seconds=0, log=tmp_path / "log.jsonl", checkpoint=tmp_path / "state.pt")
    assert last[-1]["loss"] == entries[-1]["loss"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert train(run, checkpoint=tmp_path / "state.pt")[1] == []


# With these settings Mamba reached 0.98 or more with each of the seeds 0 to 3, S4D at most 0.78
_SELECTIVE = TrainingRun(
    task="selective_copying", options={"length": 64, "num_tokens": 4, "vocab_size": 8},
    curriculum=({"length": 8}, {"length": 24}), d_model=32, batch=32, steps=600, lr=1e-2, weight_decay=0.0,
    eval_every=50, stop_at=0.95,
)  # fmt: skip
_SAME_SIZE = {"layer": "S4D", "ssm_cfg": {"d_state": 16, "expand": 2}}


def test_mamba_copies_selectively():
    model, _ = train(_SELECTIVE)
    assert evaluate(model, _SELECTIVE, batches=16) > 0.95


@pytest.mark.slow
def test_selective_copying_needs_selection():
    run = replace(_SELECTIVE, **_SAME_SIZE)
    model, _ = train(run)
    assert evaluate(model, run, batches=16) < 0.85


_INDUCTION = TrainingRun(
    task="induction_heads", options={"length": 16, "vocab_size": 8}, d_model=32, batch=32, steps=800, lr=5e-3,
    weight_decay=0.0, stop_at=0.99,
)  # fmt: skip
# The recipe of tools/train_synthetic.py: 0.99 or more at 256, and 0.96 at 1,024, with each of the seeds 0 to 4
_HOLDING = replace(
    _INDUCTION, steps=500, lr=1e-2, eps=1e-20, label_smoothing=0.1, stop_at=1.1, ssm_cfg={"dt_min": 0.1, "dt_max": 1.0}
)


def test_induction_heads_need_selection():
    """Trained at length 16, Mamba recalls at 256; an LTI S4D of its size learns the length, not the rule."""
    mamba, _ = train(_HOLDING)
    s4d, _ = train(replace(_INDUCTION, **_SAME_SIZE))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (mamba, s4d)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)
    assert evaluate(s4d, _INDUCTION, batches=8) > 0.95
    for length in (64, 256):
        assert evaluate(mamba, _INDUCTION, batches=8, length=length) > 0.95
        assert evaluate(s4d, _INDUCTION, batches=8, length=length) < 0.4
