"""The synthetic tasks of the Mamba papers: copying, selective copying, induction heads, associative recall.

Each generator returns a batch of token ids ``(B, L)`` and targets ``(B, L)``: the token that the model should output at
each position, -100 where nothing is asked. They are made on the generator's device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

__all__ = ["IGNORE", "TASKS", "accuracy", "copying", "induction_heads", "mqar", "selective_copying", "task"]

IGNORE = -100
"""Target where nothing is asked (PyTorch's ``ignore_index``)."""


def _check(length: int, least: int, what: str) -> None:
    if length < least:
        raise ValueError(f"length: expected at least {least} for {what}, got {length}")


def _device(generator: torch.Generator | None) -> torch.device:
    """Where a batch is made: on the generator's device."""
    return torch.device("cpu") if generator is None else generator.device


def _copy_answer(places: Tensor, length: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Lay out memory tokens among noise (id 0), then markers (id 1) at which they are to be repeated."""
    batch, count = tokens.shape
    inputs = tokens.new_zeros(batch, length + count)
    inputs.scatter_(1, places, tokens)
    inputs[:, length:] = 1
    targets = torch.full_like(inputs, IGNORE)
    targets[:, length:] = tokens
    return inputs, targets


def copying(
    batch: int, length: int = 1024, num_tokens: int = 16, vocab_size: int = 16, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Remember the first tokens, wait through noise, repeat them.

    A system that does not depend on time can do it: the distance is always the same.

    Args:
        batch: Sequences.
        length: Tokens before the answer.
        num_tokens: Tokens to remember.
        vocab_size: Ids; 0 is noise, 1 the marker that asks for the answer.
        generator: Source of randomness.

    Returns:
        Inputs and targets, ``(batch, length + num_tokens)``.

    Source:
        Arjovsky et al. 2016; Gu & Dao 2023, figure 2 (left).
    """
    _check(length, num_tokens, f"{num_tokens} tokens")
    device = _device(generator)
    tokens = torch.randint(2, vocab_size, (batch, num_tokens), generator=generator, device=device)
    places = torch.arange(num_tokens, device=device).expand(batch, -1)
    return _copy_answer(places, length, tokens)


def selective_copying(
    batch: int, length: int = 1024, num_tokens: int = 16, vocab_size: int = 16, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Remember tokens at random places among noise, and repeat them in order.

    The distances vary, so a model must look at what it reads to decide what to keep.

    Args:
        batch: Sequences.
        length: Tokens before the answer.
        num_tokens: Tokens to remember.
        vocab_size: Ids; 0 is noise, 1 the marker that asks for the answer.
        generator: Source of randomness.

    Returns:
        Inputs and targets, ``(batch, length + num_tokens)``.

    Source:
        Jing et al. 2019; Gu & Dao 2023, section 4.1.1: length 4096 (here 1024 by default), 16 tokens.
    """
    _check(length, num_tokens, f"{num_tokens} tokens")
    device = _device(generator)
    tokens = torch.randint(2, vocab_size, (batch, num_tokens), generator=generator, device=device)
    places = (
        torch.rand(batch, length, generator=generator, device=device).argsort(dim=1)[:, :num_tokens].sort(dim=1).values
    )
    return _copy_answer(places, length, tokens)


def induction_heads(
    batch: int, length: int = 256, vocab_size: int = 16, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Recall what followed a special token when it comes again at the end.

    Args:
        batch: Sequences.
        length: Length of a sequence.
        vocab_size: Ids of ordinary tokens; the special token is ``vocab_size``, so models need one more.
        generator: Source of randomness.

    Returns:
        Inputs and targets, ``(batch, length)``; only the last position is asked.

    Source:
        Olsson et al. 2022; Gu & Dao 2023, section 4.1.2: trained at 256, tested up to 2 ** 20.
    """
    _check(length, 4, "the special token, what follows it, and its repetition")
    device = _device(generator)
    inputs = torch.randint(0, vocab_size, (batch, length), generator=generator, device=device)
    place = torch.randint(0, length - 2, (batch, 1), generator=generator, device=device)
    inputs.scatter_(1, place, vocab_size)
    inputs[:, -1] = vocab_size
    targets = torch.full_like(inputs, IGNORE)
    targets[:, -1] = inputs.gather(1, place + 1).squeeze(1)
    return inputs, targets


def mqar(
    batch: int,
    length: int = 256,
    num_pairs: int = 32,
    vocab_size: int = 8192,
    power: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: store key-value pairs, then give the value of each key when it comes again.

    Args:
        batch: Sequences.
        length: Length of a sequence, even, at least ``4 * num_pairs``.
        num_pairs: Pairs to store.
        vocab_size: Ids; 0 is filler, keys are in the lower half, values in the upper.
        power: Queries come after a gap that follows a power law with this exponent minus one.
        generator: Source of randomness.

    Returns:
        Inputs and targets, ``(batch, length)``.

    Source:
        Arora et al. 2023, "Zoology", appendix E; Dao & Gu 2024, section 9.1.
    """
    _check(length, 4 * num_pairs, f"{num_pairs} pairs and queries")
    half, device = vocab_size // 2, _device(generator)
    keys = torch.rand(batch, half - 1, generator=generator, device=device).argsort(dim=1)[:, :num_pairs] + 1
    values = torch.rand(batch, vocab_size - half, generator=generator, device=device).argsort(dim=1)[:, :num_pairs]
    values = values + half
    inputs = torch.zeros(batch, length, dtype=torch.long, device=device)
    inputs[:, 0 : 2 * num_pairs : 2], inputs[:, 1 : 2 * num_pairs : 2] = keys, values
    gaps = (length - 2 * num_pairs) // 2
    weight = power * torch.arange(1, gaps + 1, dtype=torch.float64, device=device) ** (power - 1)
    gap = torch.multinomial(weight.expand(batch, -1), num_pairs, generator=generator)  # without replacement
    places = 2 * num_pairs + 2 * gap
    inputs.scatter_(1, places, keys)
    targets = torch.full_like(inputs, IGNORE).scatter_(1, places, values)
    return inputs, targets


TASKS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "copying": copying,
    "selective_copying": selective_copying,
    "induction_heads": induction_heads,
    "mqar": mqar,
}


def task(name: str, **options) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a task's generator with options set.

    Args:
        name: One of :data:`TASKS`.
        **options: Arguments of the generator.

    Returns:
        ``function(batch, generator=...)``.

    Raises:
        ValueError: There is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return partial(TASKS[name], **options)


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Return the share of the asked tokens that are right.

    Args:
        logits: ``(B, L, V)``.
        targets: ``(B, L)``, -100 where nothing is asked.
    """
    asked = targets != IGNORE
    return (logits.argmax(-1)[asked] == targets[asked]).float().mean().item()
