"""``visionmamba flops``, and the committed table that ``tools/flops.py`` writes."""

import csv
import json
from pathlib import Path

import pytest

from visionmamba.analysis.published import PUBLISHED

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "flops.csv"


def test_json(run):
    result = run("flops", "test_vmamba", "--size", "32x64", "--json")
    (row,) = json.loads(result.out)
    assert row["input_size"] == [1, 3, 32, 64]
    assert row["flops"] == row["layers"] + row["scan"]
    assert row["modules"] == []
    (row,) = json.loads(run("flops", "test_vmamba", "--by-module", "--json").out)
    assert "stages.0.blocks.0.mixer" in {module["name"] for module in row["modules"]}


def test_text_states_both_conventions(run):
    result = run("flops", "test_vim", "--by-module", "--depth", 2)
    assert result.status == 0
    for text in ("9BLDN + BLD", "(7N + 3)BLD", "test_vim", "blocks.0", "patch_embed", "Training MiB"):
        assert text in result.out
    assert "blocks.0.mixer.in_proj" not in result.out


def test_a_peer_that_must_be_made_for_its_size(run):
    (row,) = json.loads(run("flops", "deit_tiny_patch16_224", "--size", "384", "--json").out)
    assert row["flops"] / 1e9 == pytest.approx(4.70, abs=0.01)  # 3.16 without attention


def test_patterns_and_peers(run):
    rows = json.loads(run("flops", "test_v*", "deit_tiny_patch16_224", "--json").out)
    assert [row["name"] for row in rows] == ["test_vim", "test_vmamba", "deit_tiny_patch16_224"]
    assert rows[-1]["scan"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["test_vmanba"], "unknown model 'test_vmanba'; did you mean test_vmamba"),
        (["nothing_*"], "no model fits 'nothing_*'"),
        (["test_vim", "--size", "big"], "--size: expected a size such as 224 or 160x224, got 'big'"),
        (["test_vim", "--size", "0"], "--size: expected a size"),
        (["vim_tiny_patch16_224", "--size", "8"], "vim_tiny_patch16_224: cannot be counted at 8x8"),
    ],
)
def test_bad_input_is_one_sentence(run, arguments, message):
    result = run("flops", *arguments)
    assert result.status == 1
    assert result.out == ""
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


ROWS = list(csv.DictReader(TABLE.open(encoding="utf-8")))


class TestCommittedTable:
    def test_it_has_every_model(self):
        assert {row["model"] for row in ROWS} == set(PUBLISHED)

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
    def test_figures_are_equal_or_explained(self, row):
        assert row["gflops_published"] == (PUBLISHED[row["model"]].gflops or "")
        assert row["difference"] == "0" or row["note"]

    @pytest.mark.parametrize("name", ["test_vmamba", "vim_tiny_patch16_224", "vmamba_tiny_s1l8", "plainmamba_l1"])
    def test_it_is_up_to_date(self, name):
        import importlib.util

        spec = importlib.util.spec_from_file_location("flops_tool", TABLE.parents[1] / "tools" / "flops.py")
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        assert tool.row(name) == next(row for row in ROWS if row["model"] == name)
