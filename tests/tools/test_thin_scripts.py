"""The scripts in ``tools`` that stand for a command of ``visionmamba``."""

import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.parametrize(("script", "option"), [("benchmark.py", "--peers"), ("export.py", "--format")])
def test_a_script_is_its_command(script, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOLS / script), run_name="__main__")
    assert not stopped.value.code
    assert option in capsys.readouterr().out
