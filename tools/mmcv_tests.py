"""Run mmcv's own tests of its operators against the stand-in for them.

The source distributions of mmcv (2.1.0, 2.2.0) and onedl-mmcv (2.3.6) leave the operators' tests out, so they come from
mmcv's repository: ``python tools/mmcv_tests.py fetch --into build/mmcv`` clones its ``tests`` folder at a tag, and
``python tools/mmcv_tests.py run --into build/mmcv [--on-cpu] [pytest's arguments]`` runs those of nms, roi_align,
roi_pool, (modulated) deformable convolution, focal loss, multi-scale deformable attention and box overlaps. Most ask
for a GPU and skip without one; with ``--on-cpu`` they run on the CPU: whatever asks for ``cuda`` gets ``cpu``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

_REPOSITORY, _TAG = "https://github.com/open-mmlab/mmcv", "v2.1.0"
_TESTS = (
    "nms", "roi_align", "roi_pool", "deform_conv", "modulated_deform_conv", "focal_loss", "ms_deformable_attn", "bbox",
)  # fmt: skip


class OnCpu(TorchFunctionMode):
    """Gives ``cpu`` to every function of PyTorch that is asked for ``cuda``."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call the function with the device replaced."""
        if function is torch.Tensor.cuda:
            return args[0]
        args = ["cpu" if isinstance(value, str) and value.startswith("cuda") else value for value in args]
        kwargs = {
            key: "cpu" if key == "device" and str(value).startswith("cuda") else value
            for key, value in (kwargs or {}).items()
        }
        return function(*args, **kwargs)


def pretend() -> None:
    """Let the tests believe in a GPU, and their tensors stay on the CPU."""
    torch.cuda.is_available = lambda: True
    torch.nn.Module.cuda = lambda module, *_: module
    autocast = torch.amp.autocast
    torch.amp.autocast = lambda _device, *args, **kwargs: autocast("cpu", *args, dtype=torch.float16, **kwargs)
    OnCpu().__enter__()


def fetch(into: Path) -> None:
    """Clone the ``tests`` folder of mmcv's repository."""
    clone = ["git", "clone", "-q", "--depth", "1", "--branch", _TAG, "--filter=blob:none", "--sparse", _REPOSITORY]
    try:
        subprocess.run([*clone, str(into)], check=True)
        subprocess.run(["git", "-C", str(into), "sparse-checkout", "set", "tests"], check=True)
    except subprocess.CalledProcessError as error:  # git has said why
        raise SystemExit(f"{into}: {_REPOSITORY} could not be cloned there") from error


def run(into: Path, on_cpu: bool, arguments: list[str]) -> int:
    """Run the tests; returns pytest's exit status."""
    import pytest

    paths = [into / "tests" / "test_ops" / f"test_{name}.py" for name in _TESTS]
    found = [str(path.resolve()) for path in paths if path.is_file()]
    if not found:
        raise SystemExit(f"{into}: no tests of operators; run fetch first")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import visionmamba.openmmlab

    if not visionmamba.openmmlab.install():
        raise SystemExit("mmcv has its compiled operators here: nothing of ours would be tested")
    if on_cpu:
        pretend()
    os.chdir(into)  # the tests read ./tests/data
    return pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-rs", *arguments, *found])


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["fetch", "run"])
    parser.add_argument("--into", type=Path, default=Path("build/mmcv"))
    parser.add_argument("--on-cpu", action="store_true", help="run what asks for a GPU on the CPU")
    options, rest = parser.parse_known_args()
    if options.command == "fetch":
        fetch(options.into)
    else:
        raise SystemExit(run(options.into, options.on_cpu, rest))


if __name__ == "__main__":
    main()
