"""Train Mamba, Mamba-2 or S4D on a synthetic task, and plot the logs.

``python tools/train_synthetic.py selective_copying --layer Mamba1 --out results/synthetic`` writes
``selective_copying_Mamba1.jsonl`` (the run, an entry an evaluation, the final accuracies). ``--paper`` takes the sizes
of the papers' experiments, which want a GPU. ``python tools/train_synthetic.py plot --out results/synthetic`` draws
every log in the folder.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_ops import provenance

from visionmamba.language import MambaLMHeadModel
from visionmamba.language.synthetic import TASKS
from visionmamba.language.training import TrainingRun, evaluate_lengths, train

app = typer.Typer(add_completion=False, help=__doc__)

_SIZES = {"Mamba1": {}, "Mamba2": {"headdim": 16, "d_state": 64}, "S4D": {"d_state": 32, "expand": 2}}
"""Mixer arguments that give the three models about the same number of parameters."""


def _lengths(*lengths: int) -> list[dict[str, int]]:
    return [{"length": length} for length in lengths]


_SMALL: dict[str, dict[str, Any]] = {
    "copying": {"options": {"length": 64, "num_tokens": 8}, "steps": 2000, "batch": 32, "lr": 3e-3},
    "selective_copying": {
        "options": {"length": 64, "num_tokens": 8}, "curriculum": _lengths(16, 32), "steps": 4000, "batch": 32,
        "lr": 5e-3, "weight_decay": 0.0,
    },
    "induction_heads": {
        "options": {"length": 64}, "curriculum": _lengths(16, 32), "steps": 2500, "batch": 32, "lr": 3e-3,
        "weight_decay": 0.0,
    },
    "mqar": {"options": {"length": 64, "num_pairs": 8, "vocab_size": 128}, "steps": 3000, "lr": 3e-3},
}  # fmt: skip
_PAPER: dict[str, dict[str, Any]] = {
    "copying": {"options": {"length": 1024, "num_tokens": 16}, "steps": 20_000, "batch": 32, "lr": 2e-3},
    "selective_copying": {
        "options": {"length": 1024, "num_tokens": 16}, "curriculum": _lengths(16, 32, 64, 128, 256, 512),
        "steps": 16_000, "batch": 32, "lr": 5e-3, "weight_decay": 0.0,
    },
    "induction_heads": {
        "options": {"length": 256}, "curriculum": _lengths(16, 32, 64, 128), "steps": 6000, "batch": 64, "lr": 1e-2,
        "weight_decay": 0.0, "eps": 1e-20, "label_smoothing": 0.1,
        "stop_at": 1.1,  # what is learnt last is to forget nothing for longer
    },
    "mqar": {
        "options": {"length": 256, "num_pairs": 64, "vocab_size": 1024},
        "curriculum": [{"length": 64, "num_pairs": 8}, {"length": 128, "num_pairs": 32}], "steps": 4000, "lr": 3e-3,
    },
}  # fmt: skip
_STEP_SIZES = {"induction_heads": {"dt_min": 0.1, "dt_max": 1.0}}
"""Of Mamba at initialisation. With the usual 0.001 to 0.1 a state outlives 256 tokens by itself; with these only once
the model has learnt to close its gate on ordinary tokens, and then it outlives far more."""
_LENGTHS = [2**power for power in range(5, 21)]
"""Lengths that induction heads are tested at, from that of training; on a CPU up to 256 times it."""


def _final(model: MambaLMHeadModel, run: TrainingRun) -> dict[str, dict[int, float]]:
    """Accuracies of the trained model: on many batches, and for induction heads at other lengths."""
    if run.task != "induction_heads":
        return {"length": evaluate_lengths(model, run, [run.options["length"]], 16)}
    results: dict[int, float] = {}
    trained, longest = run.options["length"], _LENGTHS[-1] if model.lm_head.weight.is_cuda else 0
    for length in [n for n in _LENGTHS if trained <= n <= max(longest, 256 * trained)]:
        sequences = 128 if length <= 2**16 else 32
        batch = max(1, min(sequences, 2**19 // length))
        results |= evaluate_lengths(model, replace(run, batch=batch), [length], sequences // batch)
    return {"length": results}


def _label(run: dict[str, Any]) -> str:
    """What sets a run apart from the others of its task."""
    label = f"{run['layer']}, N={run['ssm_cfg'].get('d_state', 16)}"
    if "dt_max" in run["ssm_cfg"]:
        label += f", step sizes to {run['ssm_cfg']['dt_max']:g}"
    label += f", smoothing {run['label_smoothing']:g}" if run.get("label_smoothing") else ""
    return f"{label}, seed {run['seed']}"


@app.command(name="plot")
def plot(out: Annotated[Path, typer.Option(help="Folder with the logs.")] = Path("results/synthetic")) -> None:
    """Draw accuracy against steps of every log in a folder, and accuracy against length where there is one."""
    import matplotlib.pyplot as plt

    logs = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(out.glob("*.jsonl"))
    }
    tasks = sorted({entries[0]["run"]["task"] for entries in logs.values()})
    panels = len(tasks) + ("induction_heads" in tasks)
    figure, grid = plt.subplots(-(-panels // 2), min(panels, 2), figsize=(12, 4.2 * -(-panels // 2)), squeeze=False)
    axes = grid.flatten()
    for axis in axes[panels:]:
        axis.remove()
    for entries in logs.values():
        run, points = entries[0]["run"], [entry for entry in entries if "step" in entry]
        axis, label = axes[tasks.index(run["task"])], _label(run)
        axis.plot([p["step"] for p in points], [p["accuracy"] for p in points], label=label)
        axis.set(title=run["task"].replace("_", " "), xlabel="step", ylabel="accuracy", ylim=(0, 1.02))
        final = entries[-1].get("length", {})
        if len(final) > 1:
            axes[panels - 1].plot([int(n) for n in final], list(final.values()), marker="o", label=label)
            axes[panels - 1].set(title="induction heads: length", xlabel="test length", ylim=(0, 1.02))
            axes[panels - 1].set_xscale("log", base=2)
    for axis in axes[:panels]:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "synthetic.png", dpi=120)
    typer.echo(f"wrote {out / 'synthetic.png'}")


def _settings(
    task: str, layer: str, paper: bool, length: int | None, ssm_cfg: dict[str, Any], given: dict[str, Any]
) -> TrainingRun:
    """A run from the tables and what the command line says."""
    settings = (_PAPER if paper else _SMALL)[task] | {name: value for name, value in given.items() if value is not None}
    if length is not None:
        stages = [stage for stage in settings.get("curriculum", ()) if stage["length"] < length]
        settings |= {"options": settings["options"] | {"length": length}, "curriculum": stages}
    ssm_cfg = (_STEP_SIZES.get(task, {}) if paper and layer != "S4D" else {}) | ssm_cfg
    defaults = {"eval_every": max(50, settings["steps"] // 200), "stop_at": 0.998}
    return TrainingRun(layer=layer, task=task, ssm_cfg=_SIZES[layer] | ssm_cfg, **(defaults | settings))


def _command(task: str) -> None:
    """Add the command that trains on a task."""

    def command(
        layer: Annotated[str, typer.Option(help="Mamba1, Mamba2 or S4D.")] = "Mamba1",
        paper: Annotated[bool, typer.Option("--paper", help="The papers' sizes; wants a GPU.")] = False,
        length: Annotated[int | None, typer.Option(help="Length of the sequences; shorter ones come first.")] = None,
        steps: Annotated[int | None, typer.Option(help="Optimisation steps at most.")] = None,
        lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
        weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
        eps: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
        label_smoothing: Annotated[float | None, typer.Option(help="Share of targets for all tokens.")] = None,
        batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
        d_model: Annotated[int | None, typer.Option(help="Width.")] = None,
        d_state: Annotated[int | None, typer.Option(help="States a channel.")] = None,
        dt: Annotated[tuple[float, float] | None, typer.Option(help="Step sizes of Mamba at initialisation.")] = None,
        stop_at: Annotated[float | None, typer.Option(help="Stop at this accuracy, three times in a row.")] = None,
        seed: int = 0,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
        dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for autocast.")] = "float32",
        graph: Annotated[bool, typer.Option(help="Replay steps as CUDA graphs.")] = torch.cuda.is_available(),
        seconds: Annotated[float, typer.Option(help="Stop after this long, to be resumed.")] = float("inf"),
        resume: Annotated[bool, typer.Option("--resume", help="Keep a checkpoint, and go on from it.")] = False,
        out: Annotated[Path, typer.Option(help="Folder for the log.")] = Path("results/synthetic"),
    ) -> None:
        given = {
            "steps": steps, "lr": lr, "weight_decay": weight_decay, "eps": eps, "label_smoothing": label_smoothing,
            "batch": batch, "d_model": d_model,
        }  # fmt: skip
        ssm_cfg = {} if d_state is None else {"d_state": d_state}
        ssm_cfg |= {} if dt is None else {"dt_min": dt[0], "dt_max": dt[1], "dt_init_floor": dt[0]}
        given |= {"seed": seed, "stop_at": stop_at, "dtype": dtype}
        run = _settings(task, layer, paper, length, ssm_cfg, given)
        varied = {"L": length, "N": d_state, "dt": dt and dt[1], "lr": lr, "eps": eps, "smoothing": label_smoothing}
        varied |= {"seed": seed or None}
        name = "_".join([task, layer, *(f"{key}{value:g}" for key, value in varied.items() if value is not None)])
        log, checkpoint = out / f"{name}.jsonl", out / f"{name}.pt" if resume else None
        model, _ = train(run, device, log, lambda entry: typer.echo(json.dumps(entry)), graph, seconds, checkpoint)
        final = _final(model, run) | {"parameters": sum(p.numel() for p in model.parameters())} | _environment(device)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(final) + "\n")
        typer.echo(json.dumps(final))

    command.__doc__ = f"Train on {task.replace('_', ' ')}."
    app.command(name=task)(command)


def _environment(device: str) -> dict[str, str]:
    return provenance() if torch.device(device).type == "cuda" else {"gpu": "none", "torch": torch.__version__}


for _task in TASKS:
    _command(_task)


if __name__ == "__main__":
    app()
