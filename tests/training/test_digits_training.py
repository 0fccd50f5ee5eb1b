"""``tools/train.py`` learns the digits with each family's micro model, and ``tools/validate.py`` agrees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from digit_folder import write_digits

import visionmamba

ROOT = Path(visionmamba.__file__).parents[1]
FAMILIES = (
    "test_vim", "test_vmamba", "test_plainmamba", "test_local_vim", "test_local_vmamba", "test_efficient_vmamba",
    "test_mamba2d", "test_mamba3d",
)  # fmt: skip
EXPECTED = 93.0
"""Per cent of the 599 held-out digits; a linear classifier on the pixels reaches about 95."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


def _tool(name, *arguments):
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_the_digits(name, digits, tmp_path):
    recipe = ROOT / "configs" / "classification" / "digits.yaml"
    epochs = _tool("train.py", recipe, f"model={name}", f"data={digits}", f"out={tmp_path}").splitlines()
    print(name, epochs[-1])
    arguments = ["device=cpu", "workers=0", f"model={name}", f"checkpoint={tmp_path / 'last.safetensors'}"]
    result = json.loads(_tool("validate.py", *arguments, f"data={digits}"))
    assert result["images"] == 599
    assert f"eval_top1 {result['top1']:.4g}" in epochs[-1]
    assert result["top1"] >= EXPECTED
