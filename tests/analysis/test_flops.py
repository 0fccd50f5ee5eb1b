"""Operation counts: the authors' figures, and counters that a user calls without this package's help."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import timm
import torch

from visionmamba.analysis.flops import CONVENTIONS, count_flops, count_operations, flops_by_operator, input_shape
from visionmamba.analysis.published import PUBLISHED, RULES, agrees
from visionmamba.ops.scan_path import scan_path
from visionmamba.ops.selective_scan import flops
from visionmamba.zoo import model_names

EXACT = {name: row for name, row in PUBLISHED.items() if row.gflops and len(row.gflops.partition(".")[2]) == 9}
TEST_MODELS = [name for name in PUBLISHED if name.startswith("test_")]


def _macs(counts) -> int:
    return sum(number for name, number in counts.items() if name in ("conv", "linear", "matmul", "causal_conv1d"))


def test_every_model_has_a_published_row():
    assert set(PUBLISHED) == set(model_names())
    assert len(EXACT) == 9


@pytest.mark.parametrize("name", EXACT)
def test_published_counts_to_the_last_digit(name):
    """The authors' own counter at 224 x 224."""
    expected = int(EXACT[name].gflops.replace(".", ""))
    assert count_flops(timm.create_model(name, device="meta"), (3, 224, 224)) == expected


def test_known_counts():
    assert count_flops(timm.create_model("vmamba_tiny_s1l8", device="meta")) == 4_905_609_984
    assert count_flops(timm.create_model("vanilla_vmamba_tiny", device="meta")) == 5_626_895_040


@pytest.mark.parametrize("name", [name for name, row in PUBLISHED.items() if row.gflops and name not in EXACT])
def test_published_figures_follow_from_their_rules(name):
    row = PUBLISHED[name]
    model = timm.create_model(name, device="meta")
    assert agrees(RULES[row.rule](model) / 1e9, row.gflops)
    assert agrees(count_flops(model) / 1e9, row.gflops) or row.note


@pytest.mark.parametrize(
    "value, printed, cut, expected",
    [(1.49, "1.5", False, True), (3.08, "3.0", False, False), (3.08, "3.0", True, True), (33.7, "33", True, True),
     (33.7, "34", True, True), (33.7, "35", True, False)],
)  # fmt: skip
def test_agreement_with_printed_figures(value, printed, cut, expected):
    assert agrees(value, printed, cut) == expected


@pytest.mark.parametrize("name", TEST_MODELS)
def test_three_counters_agree(name):
    """Ours, fvcore's, MMEngine's and PyTorch's (2 a multiply-accumulate), on a model of each family."""
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model(name).eval()
    x = torch.zeros(input_shape(model))
    mine, scan = flops_by_operator(model), torch.ops.visionmamba.selective_scan
    counters = [pytest.importorskip("fvcore.nn").FlopCountAnalysis]
    if importlib.util.find_spec("mmengine"):
        counters.append(importlib.import_module("mmengine.analysis").FlopAnalyzer)
    traced = []
    for counter in counters:
        analysis = counter(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        traced.append(analysis.tracer_warnings("none").by_operator())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    by_torch = counter.get_flop_counts()["Global"]
    for counts in traced:
        layers = sum(counts[kind] for kind in ("conv", "linear", "matmul", "addmm", "bmm", "einsum", "causal_conv1d"))
        assert layers == pytest.approx(_macs(mine), rel=1e-3 if counts["einsum"] else 0)  # fvcore rounds einsum
        assert counts["layer_norm"] == mine.get("layer_norm", 0)
        assert counts["batch_norm"] == mine.get("batch_norm", 0)
        assert counts["selective_scan"] == pytest.approx(mine["selective_scan"], abs=2e-3 * mine["selective_scan"])
        assert counts["selective_scan"] == traced[0]["selective_scan"]
    expansion = _step_size_macs(model, x)
    # the step sizes' expansion is multiply-accumulates: one each for fvcore, two for PyTorch
    assert by_torch[scan] - expansion == traced[0]["selective_scan"]
    assert sum(by_torch.values()) - by_torch[scan] == 2 * _macs(mine)


def _step_size_macs(model, x) -> int:
    """Sum over the scans that run: images, steps, channels of all directions and rank."""
    found = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.visionmamba.selective_scan.default:
                (directions, channels, _), rank = args[2].shape, args[1].shape[-1]
                if rank != channels:
                    steps = scan_path(args[10], tuple(args[11])).order.shape[1]
                    found.append(x.shape[0] * steps * directions * channels * rank)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Spy():
        model(x)
    return sum(found)


def test_a_path_over_a_part_of_the_tokens_is_counted_by_its_steps():
    """EfficientVMamba's four sub-grids have a quarter of the tokens each."""
    whole = flops.scan_flops((1, 196, 8), (4, 8, 2))
    assert flops.steps_of("sub_200,subT_210,sub_201,subT_211", (14, 14)) == 49
    assert 4 * flops.scan_flops((1, 196, 8), (4, 8, 2), 49) == whole
    assert 4 * flops.recurrence_flops((1, 196, 8), (4, 8, 2), 49) == flops.recurrence_flops((1, 196, 8), (4, 8, 2))


def test_conventions_differ_in_the_scan_alone():
    model = timm.create_model("test_vim", device="meta")
    upstream, recurrence = (flops_by_operator(model, convention=convention) for convention in CONVENTIONS)
    assert {name for name in upstream if upstream[name] != recurrence[name]} == {"selective_scan"}
    blocks, steps, channels, states = 3, 65, 2 * 128, 8
    less = upstream["selective_scan"] - recurrence["selective_scan"]
    assert less == blocks * steps * channels * ((9 * states + 1) - (7 * states + 3))
    with pytest.raises(ValueError, match="convention: expected one of upstream, recurrence, got 'mine'"):
        count_flops(model, convention="mine")


def test_counts_grow_with_batch_and_leave_the_model_alone():
    model = timm.create_model("test_vmamba").train()
    one, three = (count_flops(model, (batch, 3, 32, 32)) for batch in (1, 3))
    assert three == 3 * one
    assert model.training


def test_operators_are_named():
    counts = flops_by_operator(timm.create_model("test_vmamba"), (3, 32, 32))
    sizes = [(24, 64, 1, 2), (48, 16, 1, 3), (64, 4, 2, 4), (96, 1, 1, 6)]  # channels, tokens, blocks, rank
    expected = sum(
        blocks * (flops.scan_flops((1, tokens, dim), (4, dim, 1)) + tokens * 4 * dim * rank)
        for dim, tokens, blocks, rank in sizes
    )
    assert counts["selective_scan"] == expected
    assert {"conv", "linear", "layer_norm"} <= set(counts)


def test_modules_add_up():
    counts = count_operations(timm.create_model("test_vmamba", device="meta"), (64, 64))["upstream"]
    parts = [module for module in counts if module and "." not in module]
    assert {"patch_embed", "stages", "head"} <= set(parts)
    assert sum(sum(counts[part].values()) for part in parts) == sum(counts[""].values())
    blocks = [module for module in counts if module.startswith("stages.2.blocks.") and module.count(".") == 3]
    assert len(blocks) == 2
    assert counts[blocks[0]] == counts[blocks[1]]


def test_peers_attention_is_counted():
    """DeiT-S: 4.6 G, of which attention, which fvcore leaves out where it is fused, 2 x 12 x 197 x 197 x 384."""
    assert count_flops(timm.create_model("deit_small_patch16_224", device="meta")) / 1e9 == pytest.approx(
        4.61, abs=0.01
    )


@pytest.mark.parametrize("size", [(1, 3, 32, 32, 32), (0, 32), (32,)])
def test_impossible_input_sizes(size):
    with pytest.raises(ValueError, match="input_size: expected"):
        count_flops(timm.create_model("test_vmamba", device="meta"), size)


def test_multi_head_scan_is_counted():
    assert flops_by_operator(timm.create_model("test_vmamba", ssm="multi_head"), (3, 32, 32))["ssd"] > 0


USER = """
import sys
{first}
import timm, torch
{second}
assert not any(name.startswith(("fvcore", "mmengine")) for name in sys.modules) or {eager}
{counter}
model = timm.create_model("test_vmamba").eval()
counts = Counter(model, torch.zeros(1, 3, 32, 32)).by_operator()
assert counts["selective_scan"] > 0, counts
"""
FVCORE = "from fvcore.nn import FlopCountAnalysis as Counter"
MMENGINE = "from mmengine.analysis import FlopAnalyzer as Counter"


@pytest.mark.parametrize("counter", [FVCORE, MMENGINE], ids=["fvcore", "mmengine"])
@pytest.mark.parametrize("eager", [False, True], ids=["imported after", "imported before"])
def test_other_counters_know_the_scan(counter, eager):
    """Whichever is imported first; and this package imports neither."""
    pytest.importorskip("mmengine" if counter is MMENGINE else "fvcore")
    first = counter if eager else "import visionmamba"
    second = "import visionmamba" if eager else ""
    program = USER.format(first=first, second=second, eager=eager, counter=counter)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_counter_knows_the_scan():
    from torch.utils.flop_counter import FlopCounterMode

    model = timm.create_model("test_vmamba").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert counter.get_flop_counts()["Global"][torch.ops.visionmamba.selective_scan] > 0
