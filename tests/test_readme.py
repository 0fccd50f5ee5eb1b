"""The README's commands and table do not drift from the package."""

import importlib.util
import re
from pathlib import Path

from visionmamba.cli import commands

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_zoo_table_is_the_registry():
    spec = importlib.util.spec_from_file_location("readme_zoo", ROOT / "tools" / "readme_zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rest = README.split(module.START)[1]
    assert rest[: rest.index(module.END)] == module.zoo_table(), "run python tools/readme_zoo.py"


def test_two_commands_for_a_fresh_machine():
    """``.ci/run`` runs the README's ``sh`` blocks; there are two, of one line each."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]
    demo, tests = blocks
    assert demo.startswith("pip install") and "visionmamba demo" in demo
    assert tests.startswith("pip install") and "pytest" in tests


def test_named_commands_exist():
    named = set(re.findall(r"`visionmamba ([a-z][a-z-]*)", README))
    assert named <= set(commands())
    assert {"list", "info", "predict", "doctor", "demo"} <= named


def test_linked_files_exist():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
