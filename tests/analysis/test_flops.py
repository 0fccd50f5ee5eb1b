"""Operation counts: the authors' figures, and counters that a user calls without this package's help."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

from visionmamba.analysis import count_flops, flops_by_operator
from visionmamba.ops.selective_scan import flops

PUBLISHED = [  # the authors' own counter at 224 x 224
    ("vmamba_tiny_s1l8", 4_905_609_984),
    pytest.param("vmamba_tiny_s2l5", 4_857_742_080, marks=pytest.mark.slow),
    pytest.param("vmamba_small_s2l15", 8_715_774_720, marks=pytest.mark.slow),
    pytest.param("vmamba_base_s2l15", 15_358_944_256, marks=pytest.mark.slow),
    pytest.param("vmamba_small_s1l20", 8_612_211_456, marks=pytest.mark.slow),
    pytest.param("vmamba_base_s1l20", 15_220_859_904, marks=pytest.mark.slow),
    pytest.param("vanilla_vmamba_tiny", 5_626_895_040, marks=pytest.mark.slow),
    pytest.param("vanilla_vmamba_small", 11_231_522_784, marks=pytest.mark.slow),
    pytest.param("vanilla_vmamba_base", 18_020_115_136, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, expected", PUBLISHED)
def test_published_counts(name, expected):
    assert count_flops(timm.create_model(name), (3, 224, 224)) == expected


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
