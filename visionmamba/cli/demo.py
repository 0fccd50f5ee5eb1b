"""``visionmamba demo``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionmamba.demo import DemoConfig

from ._common import CommandError, JsonOption, check_folder, check_model_name, console, one_line, print_json, progress

if TYPE_CHECKING:
    from torch import nn

    from visionmamba.demo import Trainer

_EXPECTED_ACCURACY = 0.95
_EPOCHS = DemoConfig.epochs
_SAMPLES = 60
_MICRO = 1_000_000  # parameters


@contextlib.contextmanager
def _threads_for(model: nn.Module) -> Iterator[None]:
    """Compute a micro model on one thread: its layers are too small to share, and waiting on a busy machine costs."""
    import torch

    threads = torch.get_num_threads()
    try:
        if sum(parameter.numel() for parameter in model.parameters()) < _MICRO:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _train(trainer: Trainer, checkpoint: Path) -> None:
    """Train, saving the model after each epoch."""
    from visionmamba.demo import save_checkpoint

    config = trainer.config
    saved = "nothing was saved"
    try:
        with progress() as bar:
            task = bar.add_task(f"training {config.model}", total=config.epochs * trainer.steps_per_epoch)
            for epoch in range(1, config.epochs + 1):
                loss = trainer.epoch(lambda: bar.advance(task))
                accuracy = trainer.accuracy()
                save_checkpoint(trainer.model, config.model, checkpoint)
                saved = f"{checkpoint} holds the weights after epoch {epoch} of {config.epochs} ({accuracy:.1%} right)"
                bar.update(task, description=f"training {config.model}: loss {loss:.3f}, {accuracy:.1%} right")
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {saved}", err=True)
        raise typer.Exit(130) from None


def _run(config: DemoConfig, out: Path) -> dict[str, Any]:
    from visionmamba.demo import Trainer, accuracy, classify, draw_predictions
    from visionmamba.inference import create_classifier

    start = time.perf_counter()
    checkpoint, picture = out / f"{config.model}.safetensors", out / f"{config.model}.png"
    try:
        trainer = Trainer(config)
    except Exception as error:
        raise CommandError(f"{config.model} cannot be trained on digits: {one_line(error)}") from error
    with _threads_for(trainer.model):
        _train(trainer, checkpoint)
        fresh = create_classifier(config.model, checkpoint, device=trainer.device)
        probabilities = classify(fresh, trainer.held_out)
    shown = trainer.held_out.select(slice(0, _SAMPLES))
    draw_predictions(shown, probabilities[:_SAMPLES], picture)
    return {
        "model": config.model,
        "device": str(trainer.device),
        "params": sum(parameter.numel() for parameter in fresh.parameters()),
        "epochs": config.epochs,
        "trained_on": len(trainer.train_digits.labels),
        "held_out": len(trainer.held_out.labels),
        "accuracy": accuracy(probabilities, trainer.held_out),
        "seconds": round(time.perf_counter() - start, 1),
        "checkpoint": str(checkpoint),
        "picture": str(picture),
    }


def demo(
    model: Annotated[str, typer.Option(help="Model to train; a 'test_*' model takes seconds.")] = "test_vmamba",
    epochs: Annotated[int | None, typer.Option(min=1, help=f"Passes over the data.  [default: {_EPOCHS}]")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the picture.")] = Path("visionmamba-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seeds the split, the weights and the batches.")] = 0,
    device: Annotated[str | None, typer.Option(help="Device; by default a GPU if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a micro model on handwritten digits, save it, and classify held-out digits from the saved file.

    Needs no download. With the default number of epochs it also checks the installation: it fails below 95 % right.
    """
    check_folder(out)
    import timm
    import torch

    from visionmamba.zoo import model_names

    if not timm.is_model(model):
        check_model_name(model, model_names())
    try:
        target = torch.device(device) if device else None
    except RuntimeError as error:
        raise CommandError(f"--device: {one_line(error)}") from error
    result = _run(DemoConfig(model=model, epochs=epochs or _EPOCHS, seed=seed, device=target), out)
    if as_json:
        print_json(result)
    else:
        console().print(
            f"{result['model']} ({result['params']:,} parameters) on {result['device']}: "
            f"{result['accuracy']:.1%} of {result['held_out']} held-out digits right, after {result['seconds']} s\n"
            f"checkpoint  {result['checkpoint']}\npicture     {result['picture']}"
        )
    if epochs is None and result["accuracy"] < _EXPECTED_ACCURACY:
        raise CommandError(f"expected at least {_EXPECTED_ACCURACY:.0%} of the held-out digits right")
