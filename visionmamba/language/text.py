"""Text in and out of language models: tokenizer files, and a streamer that prints text as it comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextStreamer", "load_tokenizer"]

PUBLISHED_TOKENIZER = "EleutherAI/gpt-neox-20b"
"""Tokenizer that the published Mamba models were trained with; their repositories do not hold it."""


def load_tokenizer(model: str, tokenizer: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        model: The model's folder or repository; its ``tokenizer.json`` is taken if it has one.
        tokenizer: A ``tokenizer.json``, or a folder or repository of the Hugging Face hub with one. By default the
            model's, or else GPT-NeoX's, with which the published models were trained.

    Returns:
        A tokenizer of the ``tokenizers`` library.

    Raises:
        ImportError: That library is not installed.
        FileNotFoundError: There is no ``tokenizer.json``.
    """
    from tokenizers import Tokenizer

    from .checkpoint import Source

    if tokenizer is not None and Path(tokenizer).is_file():
        return Tokenizer.from_file(tokenizer)
    for name in [tokenizer] if tokenizer is not None else [model, PUBLISHED_TOKENIZER]:
        source = Source(name)
        path = source.path("tokenizer.json")
        if path is not None:
            return Tokenizer.from_file(str(path))
    if tokenizer is not None:
        raise source.missing("no tokenizer.json")
    raise FileNotFoundError(
        f"{model}: no tokenizer.json, and {PUBLISHED_TOKENIZER}'s, the published models', cannot be had from the hub"
    )


class TextStreamer:
    """Writes the first sequence's text as its tokens come.

    Args:
        tokenizer: Turns ids into text.
        write: Takes each new piece of text.
        skip_prompt: Leave out the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object], skip_prompt: bool = False) -> None:
        self._tokenizer, self._write, self._skip_prompt = tokenizer, write, skip_prompt
        self._ids: list[int] = []
        self._written = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, ``(B, L)``, and then each step's tokens, ``(B,)``."""
        first = not self._ids
        self._ids += value[0].flatten().tolist()
        text = self._tokenizer.decode(self._ids)
        if first and self._skip_prompt:
            self._written = len(text)
        # A character may take several tokens: wait until it is whole
        complete = text[:-1] if text.endswith("\ufffd") else text
        if len(complete) > self._written:
            self._write(complete[self._written :])
            self._written = len(complete)

    def end(self) -> None:
        """Write what is left."""
        text = self._tokenizer.decode(self._ids)
        if len(text) > self._written:
            self._write(text[self._written :])
