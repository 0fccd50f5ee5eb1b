"""``python -m visionmamba.timm`` runs a script of timm's with the zoo registered."""

import subprocess
import sys

SCRIPT = """
import argparse, timm
import neighbour
parser = argparse.ArgumentParser()
parser.add_argument("--model")
name = parser.parse_args().model
assert timm.__file__.endswith("timm/__init__.py") and "visionmamba" not in timm.__file__, timm.__file__
print(__name__, neighbour.NAME, sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) > 0)
"""


def _run(*arguments, cwd):
    command = [sys.executable, "-m", "visionmamba.timm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_script_sees_the_zoo_and_timm_itself(tmp_path):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "infer.py").write_text(SCRIPT)
    (scripts / "neighbour.py").write_text("NAME = 'neighbour'")
    result = _run(scripts / "infer.py", "--model", "test_vim", cwd=tmp_path)
    assert result.stdout.split() == ["__main__", "neighbour", "True"], result.stderr


def test_missing_script_is_one_line(tmp_path):
    from visionmamba.timm import main

    for arguments, message in (([], "usage: "), ([str(tmp_path / "no.py")], "error: no such script: ")):
        try:
            main(arguments)
        except SystemExit as stop:
            assert str(stop).startswith(message)
            assert "\n" not in str(stop)
        else:
            raise AssertionError("did not exit")
