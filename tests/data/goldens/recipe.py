"""Deterministic weights and inputs for golden comparisons.

Every value is a pure function of the *upstream* state-dict key and its shape, so a golden
file needs to hold only keys, shapes and expected outputs, never weights.
"""

from __future__ import annotations

import math
import zlib

import numpy as np


def _noise(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    return rng.standard_normal(shape).astype(np.float32)


def golden_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the golden value of one state-dict entry.

    Args:
        key: the entry's name in the upstream checkpoint.
        shape: its shape there.

    Returns:
        float32 array of that shape (int64 zeros for ``num_batches_tracked``).
    """
    shape = tuple(shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    x = _noise(key, shape)
    if "A_log" in leaf or "A_b_log" in leaf:
        if leaf.startswith("A") and len(shape) >= 2:  # (..., d_state): S4D-real plus noise
            return np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)) + 0.1 * x
        return 0.5 * x  # Mamba-2: one scalar a head
    if leaf in ("dt_bias", "dt_projs_bias") or (leaf == "bias" and "dt_proj" in key):
        return -4.5 + 0.8 * x
    if leaf in ("D", "Ds", "D_b"):
        return 1.0 + 0.1 * x
    if leaf == "running_var":
        return 1.0 + 0.1 * np.abs(x)
    if leaf == "running_mean":
        return 0.1 * x
    if leaf in ("x_proj_weight", "dt_projs_weight"):
        return x / math.sqrt(shape[-1])
    if "pos_embed" in leaf or "cls_token" in leaf or "token" in leaf or "embed" in leaf:
        return 0.1 * x
    if len(shape) == 1:
        return (1.0 + 0.1 * x) if leaf == "weight" else 0.1 * x
    if len(shape) == 0:
        return 0.1 * x
    return x / math.sqrt(max(1, int(np.prod(shape[1:]))))


def golden_input(shape: tuple[int, ...], tag: str = "input") -> np.ndarray:
    """Return the golden network input: standard normal float32 of ``shape``."""
    return _noise(tag, tuple(shape))


def golden_tokens(shape: tuple[int, ...], vocab_size: int, tag: str = "tokens") -> np.ndarray:
    """Return golden token ids: int64 of ``shape`` in ``[0, vocab_size)``."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(tag.encode())))
    return rng.integers(0, vocab_size, size=tuple(shape), dtype=np.int64)
