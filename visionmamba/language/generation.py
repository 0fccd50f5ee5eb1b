"""Generation: sampling, cached decoding, streaming, and decoding steps captured as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .inference import InferenceParams

__all__ = ["GenerateOutput", "GenerationMixin", "Streamer", "check_ids", "decode", "penalize_repetition", "sample"]


class Streamer(Protocol):
    """Receives tokens as they are generated; transformers' streamers fit."""

    def put(self, value: Tensor) -> None:
        """Take the prompt, ``(B, L)``, and then each step's tokens, ``(B,)``."""

    def end(self) -> None:
        """Take note that generation is over."""


@dataclass
class GenerateOutput:
    """What :meth:`GenerationMixin.generate` returns.

    Args:
        sequences: Prompt and new tokens, ``(B, L)``.
        scores: Logits before sampling of each new token, ``(B, vocabulary)`` each; None unless asked for.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def penalize_repetition(logits: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of previous tokens by ``penalty`` (Keskar et al. 2019).

    Args:
        logits: ``(B, V)``.
        previous: Tokens so far, ``(B, L)``.
        penalty: 1 for none.
    """
    if penalty == 1.0:
        return logits
    score = logits.gather(1, previous)
    return logits.scatter(1, previous, torch.where(score < 0, score * penalty, score / penalty))


def sample(
    logits: Tensor,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of logits.

    Args:
        logits: ``(B, V)``.
        top_k: Keep the k most likely tokens; 1 is greedy, 0 keeps all.
        top_p: Keep the fewest tokens whose probabilities sum to this; 0 or 1 keep all.
        min_p: Keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        temperature: Divides the logits before ``top_p`` and ``min_p`` are applied.
        generator: Source of randomness.

    Returns:
        Token ids, ``(B,)``.

    Raises:
        ValueError: An option is out of range.
    """
    if top_k < 0 or not 0 <= top_p <= 1 or not 0 <= min_p <= 1 or temperature <= 0:
        raise ValueError(
            "sampling: expected top_k >= 0, top_p and min_p from 0 to 1 and temperature > 0, "
            f"got top_k={top_k}, top_p={top_p}, min_p={min_p}, temperature={temperature}"
        )
    if top_k == 1:
        return logits.argmax(dim=-1)
    values, tokens = logits.float().topk(min(top_k or logits.shape[-1], logits.shape[-1]), dim=-1)  # descending
    probabilities = F.softmax(values / temperature, dim=-1)
    keep = probabilities >= min_p * probabilities[:, :1]
    if 0 < top_p < 1:
        keep &= probabilities.cumsum(-1) - probabilities < top_p
    probabilities = probabilities * keep
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(1, choice).squeeze(1)


class _EagerStep:
    """Decoding steps as plain calls."""

    def __init__(self, model: Any, parameters: InferenceParams) -> None:
        self.model, self.parameters = model, parameters

    def __call__(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens.unsqueeze(1), inference_params=self.parameters, num_last_tokens=1).logits
        return logits.squeeze(1)


class _GraphStep:
    """Decoding steps as a captured CUDA graph: the launches of a step cost as much as one.

    The states of the cache are the graph's own memory, so a graph belongs to one :class:`InferenceParams`.
    """

    def __init__(self, model: Any, parameters: InferenceParams, batch: int) -> None:
        device = next(iter(model.parameters())).device
        self.parameters = parameters
        parameters.lengths_per_sample = torch.zeros(batch, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        eager = _EagerStep(model, parameters)
        parameters.seqlen_offset = 1  # any number above 0: positions come from lengths_per_sample
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels compile and choose their configurations outside the capture
                eager(self.tokens.squeeze(1))
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = eager(self.tokens.squeeze(1))
        parameters.seqlen_offset = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens.unsqueeze(1))
        self.parameters.lengths_per_sample.fill_(self.parameters.seqlen_offset)
        self.graph.replay()
        return self.logits.clone()


def _decoding_step(
    model: Any, batch: int, max_length: int, cuda_graph: bool
) -> tuple[InferenceParams, Callable[[Tensor], Tensor]]:
    """Return an empty cache and a function that runs one step on it."""
    if not cuda_graph:
        parameters = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
        return parameters, _EagerStep(model, parameters)
    cached = getattr(model, "_decoding_graph", None)
    if cached is not None:
        parameters = cached[0]
        if parameters.max_batch_size == batch and parameters.max_seqlen >= max_length:
            parameters.reset(parameters.max_seqlen, batch)
            return cached
    parameters = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    model._decoding_graph = parameters, _GraphStep(model, parameters, batch)
    return model._decoding_graph


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raise ValueError unless ids are integers from 0 to ``size - 1``."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected integer ids, got {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected ids from 0 to {size - 1}, got {low if low < 0 else high}")


def _check(
    input_ids: Tensor, max_length: int, table: int, vocab_size: int | None, teacher_outputs: Tensor | None
) -> None:
    """Raise ValueError unless there is something to continue, and room for it."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected (B, L), got shape {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise ValueError("input_ids: expected a prompt of at least one token, got none")
    if input_ids.shape[1] >= max_length:
        raise ValueError(
            f"max_length: expected more than the {input_ids.shape[1]} tokens of the prompt, got {max_length}"
        )
    if vocab_size is not None and not 0 < vocab_size <= table:
        raise ValueError(f"vocab_size: expected 1 to the {table} rows of the embedding, got {vocab_size}")
    check_ids("input_ids", input_ids, vocab_size or table)
    if teacher_outputs is not None:
        if teacher_outputs.dim() != 2 or teacher_outputs.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"teacher_outputs: expected (B, L) with B = {input_ids.shape[0]}, got shape "
                f"{tuple(teacher_outputs.shape)}"
            )
        check_ids("teacher_outputs", teacher_outputs, vocab_size or table)


@contextmanager
def _timed(enabled: bool, device: torch.device) -> Iterator[None]:
    """Print how long the block took, prompt and decoding together."""
    if not enabled:
        yield
        return
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    yield
    synchronize()
    print(f"Prompt processing + decoding time: {1000 * (time.perf_counter() - began):.0f}ms")


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Streamer | None = None,
    generator: torch.Generator | None = None,
) -> GenerateOutput:
    """Generate with a cache; see :meth:`GenerationMixin.generate`."""
    _check(input_ids, max_length, model.config.padded_vocab_size, vocab_size, teacher_outputs)
    if cg and input_ids.device.type != "cuda":
        raise ValueError(f"cg: expected a CUDA device for CUDA graphs, got {input_ids.device.type}")
    batch, prompt = input_ids.shape
    parameters, step = _decoding_step(model, batch, max_length, cg)
    sequences, scores = input_ids, []
    finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    with _timed(enable_timing, input_ids.device):
        logits = model(input_ids, inference_params=parameters, num_last_tokens=1).logits.squeeze(1)
        parameters.seqlen_offset += prompt
        while True:
            logits = logits[:, :vocab_size]
            if output_scores:
                scores.append(logits.clone())
            if teacher_outputs is not None and sequences.shape[1] < teacher_outputs.shape[1]:
                tokens = teacher_outputs[:, sequences.shape[1]]
            else:
                penalized = penalize_repetition(logits, sequences, repetition_penalty)
                tokens = sample(penalized, top_k, top_p, min_p, temperature, generator)
            if eos_token_id is not None:
                tokens = torch.where(finished, eos_token_id, tokens)
                finished |= tokens == eos_token_id
            sequences = torch.cat([sequences, tokens.unsqueeze(1)], dim=1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if sequences.shape[1] >= max_length or (eos_token_id is not None and bool(finished.all())):
                break
            logits = step(tokens)
            parameters.seqlen_offset += 1
    if streamer is not None:
        streamer.end()
    return GenerateOutput(sequences, tuple(scores) if output_scores else None)


class GenerationMixin:
    """Adds ``generate`` to a model with ``config``, ``forward`` and ``allocate_inference_cache``."""

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs,
    ) -> Tensor | GenerateOutput:
        """Continue prompts.

        The cache gives the same tokens as running the whole sequence again at each step.

        Args:
            input_ids: Prompts of one length, ``(B, L)``.
            max_length: Length of the prompt and the new tokens together.
            top_k: Sample among the k most likely tokens; 1 is greedy, 0 is all.
            top_p: Sample among the fewest tokens whose probabilities sum to this; 0 is off.
            min_p: Sample among tokens at least this fraction as likely as the likeliest; 0 is off.
            temperature: Divides the logits.
            return_dict_in_generate: Return a :class:`GenerateOutput` instead of the sequences.
            output_scores: Keep the logits of each step in it.
            **kwargs: ``repetition_penalty``; ``eos_token_id`` ends a sequence; ``teacher_outputs`` (B, L) forces
                tokens; ``vocab_size`` keeps padding rows of the embedding from being sampled; ``streamer`` receives
                tokens; ``cg`` captures the step as a CUDA graph; ``enable_timing`` prints the time taken;
                ``generator`` is the source of randomness.

        Returns:
            ``(B, length)`` token ids, or a :class:`GenerateOutput`.

        Raises:
            ValueError: The prompt is empty, too long, or has ids outside of the vocabulary; an option is out of range.
        """
        options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
        output = decode(input_ids, self, max_length, **options, output_scores=output_scores, **kwargs)
        return output if return_dict_in_generate else output.sequences
