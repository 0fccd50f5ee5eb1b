"""Check the project with OpenMMLab's own packages, in an environment made for it.

``python tools/check_originals.py ENVIRONMENT WORK [ARGUMENT ...]`` makes a virtual environment with mmengine 0.10.7,
mmcv-lite 2.1.0, mmdetection 3.3.0 and mmsegmentation 1.2.2 in the place of the maintained distributions (everything
else, PyTorch above all, is taken from the environment that runs this), and runs ``tools/check_resume.py`` and the tests
of ``tests/openmmlab`` in it, with pytest's further arguments if there are some. Needs a package index.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mmengine==0.10.7", "mmcv-lite==2.1.0", "mmdet==3.3.0", "mmsegmentation==1.2.2")


def make_environment(folder: Path) -> Path:
    """Return the interpreter of an environment with the originals; it is made if it does not exist.

    Args:
        folder: Of the environment.
    """
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], check=True)
        code = "import site; print(site.getsitepackages()[0])"
        packages = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        # later on the path than the environment's own packages, which therefore come first
        (Path(packages) / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path, help="folder of the environment; made if it does not exist")
    parser.add_argument("work", type=Path, help="folder to create for scenes, logs and checkpoints")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for pytest")
    options = parser.parse_args()
    python = str(make_environment(options.environment.resolve()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = (
        "import mmengine, mmcv, mmdet, mmseg\nfor m in mmengine, mmcv, mmdet, mmseg: print(m.__name__, m.__version__)"
    )
    commands = [
        ["-c", code],
        [str(ROOT / "tools" / "check_resume.py"), str(options.work.resolve())],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "openmmlab"), *options.arguments],
    ]
    for command in commands:
        completed = subprocess.run([python, *command], cwd=ROOT, env=environment)
        if completed.returncode:
            sys.exit(completed.returncode)


if __name__ == "__main__":
    main()
