"""``visionmamba generate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._common import CommandError, JsonOption, one_line, print_json

if TYPE_CHECKING:
    import torch

    from visionmamba.language import MambaLMHeadModel


def _model(name: str, device: str | None, dtype: str | None) -> MambaLMHeadModel:
    import torch

    from visionmamba.language import MambaLMHeadModel

    if Path(name).exists() and not Path(name).is_dir():
        raise CommandError(f"MODEL: expected a folder or a repository of the hub, got the file {name}")
    try:
        target = torch.device(device) if device else torch.accelerator.current_accelerator(check_available=True)
        kind = getattr(torch, dtype) if dtype else None
        return MambaLMHeadModel.from_pretrained(name, device=target or "cpu", dtype=kind)
    except Exception as error:
        raise CommandError(one_line(error)) from error


def _tokenizer(model: str, tokenizer: str | None) -> Any:
    from visionmamba.language.text import load_tokenizer

    try:
        return load_tokenizer(model, tokenizer)
    except ImportError as error:
        raise CommandError("text needs the tokenizers package (pip install tokenizers), or give --ids") from error
    except Exception as error:
        raise CommandError(f"tokenizer: {one_line(error)}") from error


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise CommandError(f"--ids: expected integers like 12,7,301, got {text!r}") from error


def _options(model: Any, prompt: torch.Tensor, seed: int | None, **options: Any) -> dict[str, Any]:
    import torch

    generator = None
    if seed is not None:
        generator = torch.Generator(prompt.device).manual_seed(seed)
    vocab_size = min(model.config.vocab_size, model.config.padded_vocab_size)
    cuda_graphs = prompt.device.type == "cuda"
    return options | {"generator": generator, "vocab_size": vocab_size, "cg": cuda_graphs}


def generate(
    model: Annotated[str, typer.Argument(help="Folder, or a repository of the hub: state-spaces/mamba2-130m.")],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids to continue instead of text, like 12,7,301.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest; 1 is greedy, 0 is all.")] = 1,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling; 0 is off.")] = 0.0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="Least share of the likeliest; 0 is off.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Penalty of tokens that were there before.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.json, or a folder or repository with one.")] = None,
    device: Annotated[str | None, typer.Option(help="Device; the accelerator if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    json: JsonOption = False,
) -> None:
    """Continue a text with a Mamba language model.

    Prints the text as it is generated; with --ids, the token ids.
    """
    import torch

    from visionmamba.language.text import TextStreamer

    if (prompt is None) == (ids is None):
        raise CommandError("give either a PROMPT or --ids")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise CommandError(f"--dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    words = None if prompt is None else _tokenizer(model, tokenizer)
    start = _parse_ids(ids) if words is None else words.encode(prompt).ids
    network = _model(model, device, dtype)
    input_ids = torch.tensor([start], dtype=torch.long, device=network.lm_head.weight.device)
    streamer = None
    if words is not None and not json:
        streamer = TextStreamer(words, lambda piece: typer.echo(piece, nl=False))
    options = _options(
        network, input_ids, seed, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature,
        repetition_penalty=repetition_penalty, streamer=streamer,
    )  # fmt: skip
    if words is not None:
        options["eos_token_id"] = words.token_to_id("<|endoftext|>")
    began = time.perf_counter()
    try:
        tokens = network.generate(input_ids, len(start) + max_new_tokens, **options)[0].tolist()
    except ValueError as error:
        raise CommandError(one_line(error)) from error
    seconds = time.perf_counter() - began
    if json:
        new = tokens[len(start) :]
        text = {} if words is None else {"text": words.decode(tokens)}
        print_json(text | {"prompt_ids": start, "new_ids": new, "seconds": round(seconds, 4)})
    else:
        typer.echo("" if words is not None else ",".join(map(str, tokens)))
