"""Run the tests that mamba_ssm and causal_conv1d ship in their source distributions against this package.

``python tools/upstream_tests.py fetch --into build/upstream`` downloads the source distributions with pip and unpacks
nothing but their ``tests`` folders. ``python tools/upstream_tests.py run --into build/upstream`` runs pytest on them
with the names that they import pointed at ``visionmamba``, and plain PyTorch in place of the references that they
compare with. Most want a GPU. Further arguments are pytest's (``-n 12`` for twelve processes); ``--summary FILE``
writes how many of each test's parametrisations passed, were skipped by the test itself, or failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tarfile
import types
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from visionmamba.analysis.environment import environment

_PACKAGES = ("mamba-ssm==2.3.1", "causal-conv1d==1.6.0")

_NAMES = {
    "mamba_ssm.ops.selective_scan_interface": ("visionmamba.ops", "selective_scan_fn", "selective_scan_ref"),
    "mamba_ssm.ops.triton.selective_state_update": (
        "visionmamba.ops.state_update", "selective_state_update", "selective_state_update_ref",
    ),
    "mamba_ssm.ops.triton.ssd_combined": (
        "visionmamba.ops", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined",
    ),
    "mamba_ssm.ops.triton.layernorm_gated": ("visionmamba.ops", "rmsnorm_fn", "layernorm_fn"),
    "mamba_ssm.ops.triton.layer_norm": ("visionmamba.ops", "layer_norm_fn", "rms_norm_fn"),
    "mamba_ssm.modules.mamba_simple": ("visionmamba.language", "Mamba", "Block"),
    "mamba_ssm.modules.mamba2": ("visionmamba.language", "Mamba2"),
    "mamba_ssm.modules.mha": ("visionmamba.language", "MHA"),
    "mamba_ssm.modules.mlp": ("visionmamba.language", "GatedMLP"),
    "mamba_ssm.models.mixer_seq_simple": ("visionmamba.language", "MambaLMHeadModel", "MixerModel"),
    "mamba_ssm.models.config_mamba": ("visionmamba.language", "MambaConfig"),
    "mamba_ssm.utils.generation": ("visionmamba.language", "InferenceParams", "GenerationMixin"),
    "causal_conv1d": ("visionmamba.ops", "causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_interface": ("visionmamba.ops", "causal_conv1d_fn", "causal_conv1d_update"),
    "causal_conv1d.causal_conv1d_varlen": ("visionmamba.ops", "causal_conv1d_varlen_states"),
}  # fmt: skip


def causal_conv1d_ref(
    x, weight, bias=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):
    """Compute causal_conv1d's forward with ``torch.nn.functional.conv1d``."""
    dtype, past = x.dtype, weight.shape[1] - 1
    x = x.to(weight.dtype)
    history = F.pad(x, (past, 0)) if initial_states is None else torch.cat([initial_states.to(x.dtype), x], dim=-1)
    out = F.conv1d(history, weight.unsqueeze(1), bias, groups=weight.shape[0])
    out = (out if activation is None else F.silu(out)).to(dtype)
    if not return_final_states:
        return out
    final = F.pad(history, (max(0, past - history.shape[-1]), 0))[..., -past:].to(dtype)
    return out, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """Compute causal_conv1d's update one step at a time."""
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    size, past = conv_state.shape[-1], weight.shape[1] - 1
    outputs = []
    for t in range(steps.shape[-1]):
        if cache_seqlens is None:
            conv_state.copy_(torch.roll(conv_state, -1, dims=-1))
            conv_state[..., -1] = steps[..., t]
            window = conv_state[..., -past - 1 :] if size > past else None
        else:
            position = cache_seqlens.long() + t
            places = (position.unsqueeze(1) + torch.arange(-past, 1, device=x.device)) % size
            row = torch.arange(len(conv_state), device=x.device)
            conv_state[row, :, position % size] = steps[..., t]
            window = conv_state.gather(2, places.unsqueeze(1).expand(-1, conv_state.shape[1], -1))
        outputs.append((window.to(weight.dtype) * weight).sum(-1) + (0 if bias is None else bias))
    out = torch.stack(outputs, dim=-1)
    out = (out if activation is None else F.silu(out)).to(x.dtype)
    return out.squeeze(-1) if x.dim() == 2 else out


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
    """Take the last ``state_len`` rows of each packed sequence, zeros before it."""
    states = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        rows = x[max(start, end - state_len) : end]
        states.append(F.pad(rows.T, (state_len - len(rows), 0)))
    return torch.stack(states)


_REFERENCES = {
    "causal_conv1d.causal_conv1d_interface": (causal_conv1d_ref, causal_conv1d_update_ref),
    "causal_conv1d.causal_conv1d_varlen": (causal_conv1d_varlen_states_ref,),
}


def _install_names() -> None:
    """Make modules under the upstream names that hold this package's objects."""
    for name, (source, *attributes) in _NAMES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules:
                module = types.ModuleType(path)
                module.__path__ = []
                sys.modules[path] = module
                if end > 1:
                    setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
        origin = importlib.import_module(source)
        for attribute in attributes:
            setattr(sys.modules[name], attribute, getattr(origin, attribute))
        for function in _REFERENCES.get(name, ()):
            setattr(sys.modules[name], function.__name__, function)


def pytest_configure() -> None:
    """Point the names in every process of pytest-xdist: this file is a plugin of its own run."""
    _install_names()


def pytest_addoption(parser: Any) -> None:
    """Add ``--summary``."""
    parser.addoption("--summary", type=Path, help="JSON file for the number of outcomes of each test")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Skip what this package cannot have: mamba_ssm's tests of functions that are private to its kernels.

    Tests that ask for results that differ between runs stay: by their own words they are expected failures where
    results do not.
    """
    private = pytest.mark.skip(reason="private functions of mamba_ssm's kernels: no counterpart")
    for item in items:
        if "kernel" in item.name.split("[")[0]:
            item.add_marker(private)


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Write outcomes by test, also of a run that was cut short."""
    if config.getoption("--summary") is None:
        return
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[report.nodeid.split("[")[0].rsplit("/", 1)[-1]][outcome] += 1
    totals = sum(counts.values(), Counter())
    found = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    made_with = {"torch": torch.__version__, "commit": found["commit"]}
    if torch.cuda.is_available():
        made_with["gpu"] = found["device"]
    summary = {
        "packages": _PACKAGES, "environment": made_with, "totals": totals,
        "tests": dict(sorted(counts.items())),
    }  # fmt: skip
    config.getoption("--summary").write_text(json.dumps(summary, indent=1) + "\n")


def fetch(into: Path) -> None:
    """Download the source distributions and unpack their tests."""
    into.mkdir(parents=True, exist_ok=True)
    for package in _PACKAGES:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--no-build-isolation", "--dest", str(into), package], check=True)
    for archive in into.glob("*.tar.gz"):
        with tarfile.open(archive) as files:
            tests = [member for member in files if "/tests/" in member.name]
            files.extractall(into, members=tests, filter="data")
        archive.unlink()


def run(into: Path, arguments: list[str]) -> int:
    """Run the fetched tests; returns pytest's exit status."""
    folders = [str(folder) for folder in sorted(into.glob("*/tests"))]
    if not folders:
        raise SystemExit(f"{into}: no tests; run fetch first")
    return pytest.main(
        [
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            Path(__file__).stem,
            "--import-mode=importlib",
            *arguments,
            *folders,
        ]
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["fetch", "run"])
    parser.add_argument("--into", type=Path, default=Path("build/upstream"))
    options, rest = parser.parse_known_args()
    if options.command == "fetch":
        fetch(options.into)
    else:
        raise SystemExit(run(options.into, rest))


if __name__ == "__main__":
    main()
