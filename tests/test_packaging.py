"""A wheel, an editable install and a plain checkout all hold every package; importing the package is cheap."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11 or newer")
ROOT = Path(__file__).resolve().parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = CONFIG["tool"]["setuptools"]


def _python(code: str, cwd: Path, *path: Path) -> str:
    """Run code in a fresh interpreter that finds this project on the given path alone, not where it is installed."""
    packages = [entry for entry in sys.path if entry.endswith("-packages")]
    code = f"import sys; sys.path[1:1] = {[*map(str, path)]}; sys.path += {packages}\n{code}"
    completed = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def _sources() -> dict[str, Path]:
    """Return the packages that the checkout has and their folders."""
    mapped = SETUPTOOLS["package-dir"]
    folders = [path.parent for path in (ROOT / "visionmamba").rglob("__init__.py")]
    packages = {".".join(folder.relative_to(ROOT).parts): folder for folder in folders}
    packages |= {name: ROOT / folder for name, folder in mapped.items()}
    kernels = [path.parent for path in (ROOT / "kernels").rglob("__init__.py")]
    packages |= {f"visionmamba.{'.'.join(folder.relative_to(ROOT).parts)}": folder for folder in kernels}
    return packages


def _files() -> set[str]:
    """Return the files that an installed copy has to hold."""
    files = set()
    for package, folder in _sources().items():
        patterns = ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        files |= {f"{package.replace('.', '/')}/{path.name}" for pattern in patterns for path in folder.glob(pattern)}
    return files


def test_every_package_is_declared_once_in_order():
    assert SETUPTOOLS["packages"] == sorted(_sources())


def test_no_package_at_the_top_of_kernels():
    """It would shadow Hugging Face's ``kernels`` wherever Python runs from the checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_kernel_source_is_package_data():
    held = _files()
    for path in (ROOT / "kernels").rglob("*"):
        if path.suffix in {".cu", ".cuh", ".cpp", ".h", ".py"}:
            assert f"visionmamba/{path.relative_to(ROOT).as_posix()}" in held, path


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    tree = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("visionmamba", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    return tree


def _build(hook: str, tree: Path, out: Path) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="building offline needs setuptools 77 or newer")
    out.mkdir()
    code = f"import sys, setuptools.build_meta as b; sys.stderr.write(b.{hook}({str(out)!r}))"
    completed = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_holds_every_file_and_finds_kernels(source_tree, tmp_path):
    installed = tmp_path / "site"
    with zipfile.ZipFile(_build("build_wheel", source_tree, tmp_path / "out")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licences = [name for name in wheel.namelist() if name.endswith("LICENSE")]
        wheel.extractall(installed)
    assert names == _files()
    assert len(licences) == 1
    found = _kernel_folders(_FIND, tmp_path, installed)
    assert found == [installed / "visionmamba" / "kernels" / kind for kind in ("cpu", "cuda", "triton")]


_FIND = """
import visionmamba.kernels.cpu, visionmamba.kernels.cuda, visionmamba.kernels.triton
for kind in "cpu", "cuda", "triton":
    print(sys.modules[f"visionmamba.kernels.{kind}"].__file__)
"""


def _kernel_folders(code: str, cwd: Path, *path: Path) -> list[Path]:
    return [Path(line).parent for line in _python(code, cwd, *path).splitlines()]


def test_plain_checkout_finds_kernels(tmp_path):
    assert _kernel_folders(_FIND, tmp_path, ROOT) == [ROOT / "kernels" / kind for kind in ("cpu", "cuda", "triton")]


def test_editable_install_finds_kernels(source_tree, tmp_path):
    installed = tmp_path / "site"
    zipfile.ZipFile(_build("build_editable", source_tree, tmp_path / "out")).extractall(installed)
    found = _kernel_folders(f"import site; site.addsitedir({str(installed)!r})\n{_FIND}", tmp_path, installed)
    assert found == [source_tree / "kernels" / kind for kind in ("cpu", "cuda", "triton")]


_HEAVY = ("cuda", "triton", "mmengine", "mmcv", "mmdet", "mmseg", "fvcore", "numba", "sklearn", "matplotlib", "onnx")


def test_importing_registers_every_model_and_stays_cheap(tmp_path):
    code = """
import json, torch, timm
before = set(sys.modules)
import visionmamba
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
models = timm.list_models(module=list(visionmamba.models.FAMILIES))
print(json.dumps([sorted(loaded), torch.cuda.is_initialized(), models]))
"""
    loaded, initialized, models = json.loads(_python(code, tmp_path, ROOT))
    assert not set(loaded) & set(_HEAVY)
    assert not initialized
    assert {"test_vim", "test_vmamba"} <= set(models)
