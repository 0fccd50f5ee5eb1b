"""Published sizes of the models, and the rules by which their authors counted operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from ..ops.selective_scan import flops
from .flops import count_flops, count_with, operations_table

__all__ = ["PUBLISHED", "RULES", "Published", "agrees"]


@dataclass(frozen=True)
class Published:
    """What was published about a model's size.

    Args:
        params: Parameters in millions, as printed.
        gflops: Operations in units of 1e9, as printed; None where none were published.
        rule: The rule of :data:`RULES` by which they were counted.
        source: Who printed them.
        note: Why a figure differs, a sentence.
    """

    params: str | None = None
    gflops: str | None = None
    rule: str = "upstream"
    source: str = "the authors' code and README"
    note: str = ""


def agrees(value: float, printed: str, cut: bool = False) -> bool:
    """Whether a value is the printed one to all its digits.

    Args:
        value: The value.
        printed: The printed one.
        cut: Let further digits be cut off as well as rounded.
    """
    digits = len(printed.partition(".")[2])
    cut_off = int(value * 10**digits + 1e-6) / 10**digits
    return printed == f"{value:.{digits}f}" or (cut and printed == f"{cut_off:.{digits}f}")


def _scan_of_one_direction(u: Any, delta: Any, A: Any, *arguments: Any, **_options: Any) -> int:
    steps = flops.steps_of(*arguments[7:9])
    directions, channels, states = A.shape
    recurrence = u.shape[0] * steps * directions * channels * (5 * states + 2)
    return recurrence + flops.dt_projection_macs(u, delta, A, steps) // directions


def _one_direction(model: nn.Module) -> int:
    """Count convolution and projections of one scan direction only, scans as 5 D L N + 2 D L, norms not at all."""
    table = operations_table("upstream")
    directions_of_bmm, directions_of_conv = table[torch.ops.aten.bmm], table[torch.ops.visionmamba.causal_conv1d]
    table[torch.ops.aten.bmm] = lambda a, b, out_val=None: directions_of_bmm(a, b, out_val=out_val) // a.shape[0]
    table[torch.ops.visionmamba.causal_conv1d] = lambda x, weight, *arguments, out_val=None: (
        directions_of_conv(x, weight, *arguments, out_val=out_val) // weight.shape[0]
    )
    table[torch.ops.visionmamba.selective_scan] = _scan_of_one_direction
    del table[torch.ops.aten.native_layer_norm]
    return sum(count_with({"": table}, model)[""][""].values())


def _scan_with_one_step_size(u: Any, delta: Any, A: Any, *arguments: Any, **_options: Any) -> int:
    steps = flops.steps_of(*arguments[7:9])
    return flops.scan_flops(u, A, steps) + flops.dt_projection_macs(u, delta, A, steps) // A.shape[0]


def _one_step_size(model: nn.Module) -> int:
    """Count the expansion of the step size once for all directions, and no norms."""
    table = {**operations_table("upstream"), torch.ops.visionmamba.selective_scan: _scan_with_one_step_size}
    counts = count_with({"": table}, model)[""][""]
    return sum(number for name, number in counts.items() if not name.endswith("_norm"))


RULES: dict[str, Callable[[nn.Module], int]] = {
    "upstream": count_flops,
    "one direction": _one_direction,
    "one step size": _one_step_size,
}
"""How published figures were counted, by name; functions of the model."""

_vmamba = partial(Published, source="the authors' counter")
_cited = partial(
    Published,
    rule="one direction",
    source="README (parameters), later papers (operations)",
    note="The figure that later papers cite counts convolution and projections of one scan direction instead of both, "
    "and a scan as 5DLN + 2DL.",
)
_vim = partial(Published, source="README", note="The authors publish no operation count.")
_local_vim = partial(
    Published,
    rule="one direction",
    source="README",
    note="The authors' counter takes convolution and projections of one scan direction instead of four, and a scan as "
    "5DLN + 2DL.",
)
_plainmamba = partial(
    Published,
    rule="one step size",
    source="README (parameters), paper (operations)",
    note="The published figure has no norms and expands once the step size that four directions share, which the fused "
    "scan expands for each; published parameters leave out the classifier.",
)
_efficient = partial(Published, source="README")
_mamba_nd = partial(Published, source="paper", note="The authors publish no operation count.")
_ssd = Published(note="The authors' counter does not know Mamba-2's scan, so they publish no operation count; here it "
                 "is counted as the recurrence.")  # fmt: skip
_none = Published(note="The authors publish neither an operation count nor the number of parameters.")
_search = Published(note="The supernet of the search for directions; no figures are published.")
_micro = Published(note="This project's own model for tests.")

PUBLISHED: dict[str, Published] = {
    "vanilla_vmamba_tiny": _vmamba("22.893448", "5.626895040"),
    "vanilla_vmamba_small": _vmamba("44.417416", "11.231522784"),
    "vanilla_vmamba_base": _vmamba("76.254056", "18.020115136"),
    "vmamba_tiny_s2l5": _vmamba("30.705832", "4.857742080"),
    "vmamba_small_s2l15": _vmamba("50.147752", "8.715774720"),
    "vmamba_base_s2l15": _vmamba("88.557800", "15.358944256"),
    "vmamba_tiny_s1l8": _vmamba("30.249064", "4.905609984"),
    "vmamba_small_s1l20": _vmamba("49.012840", "8.612211456"),
    "vmamba_base_s1l20": _vmamba("86.614504", "15.220859904"),
    "vmamba_tiny_m2": _ssd,
    "vmamba_small_m2": _ssd,
    "vmamba_base_m2": _ssd,
    "vim_tiny_patch16_224": _cited("7", "1.5"),
    "vim_small_patch16_224": _cited("26", "5.1"),
    "vim_base_patch16_224": _vim("98"),
    "vim_tiny_patch16_stride8_224": _vim("7"),
    "vim_small_patch16_stride8_224": _vim("26"),
    "plainmamba_l1": _plainmamba("7.3", "3.0"),
    "plainmamba_l2": _plainmamba("25.7", "8.1"),
    "plainmamba_l3": _plainmamba("50.5", "14.4"),
    "local_vim_tiny": _local_vim("8", "1.5"),
    "local_vim_tiny_middle_cls_token": _local_vim("8", "1.5"),
    "local_vim_tiny_wo_search": _local_vim("8", "1.5", source="paper"),
    "local_vim_small": _local_vim("28", "4.8"),
    "local_vim_small_searched": _local_vim("28", "4.8", source="paper"),
    "local_vim_tiny_search": _search,
    "local_vssm_tiny": Published("26", "5.7", source="README"),
    "local_vssm_small": Published("50", "11.4", source="README"),
    "local_vssm_tiny_search": _search,
    "local_vssm_small_search": _search,
    "efficient_vmamba_tiny": _efficient("6", "0.8"),
    "efficient_vmamba_small": _efficient("11.274", "1.343", source="the authors' training log"),
    "efficient_vmamba_base": _efficient("33", "4.0"),
    "mamba2d_small_patch8_224": _mamba_nd("24"),
    "mamba2d_base_patch8_224": _mamba_nd(
        "92", note="The authors publish no operation count; their weights have the parameters counted here, more than "
        "the paper's figure.",
    ),
    "mamba2d_small_patch16_224": _none,
    "mamba3d_small_ucf101": _none,
    "mamba3d_small_hmdb51": _none,
    "mamba3d_small_k400": _none,
    "mamba3d_small_btcv": _none,
    **dict.fromkeys(
        [
            "test_vim", "test_vmamba", "test_plainmamba", "test_local_vim", "test_local_vmamba",
            "test_efficient_vmamba", "test_mamba2d", "test_mamba3d",
        ],
        _micro,
    ),
}  # fmt: skip
"""Published figures by model."""
