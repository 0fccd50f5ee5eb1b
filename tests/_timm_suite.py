"""timm's own tests of its models, fetched when they are needed.

timm's wheel has no tests; its source distribution has. It is downloaded with pip, checked against a pinned hash, and
``tests/test_models.py`` kept in the user's cache folder.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from unittest import mock

import timm
from filelock import FileLock

_VERSION = "1.0.31"
_SDIST_SHA256 = "baa0b333339c46d3d6d4965d99b69f5053afed71210e8f433d7ea5ee6a18f0ec"
_SUITE = f"timm-{_VERSION}/tests/test_models.py"
_SUITE_SHA256 = "ffb62c6df02601a96c2fda403723a7f96a806897ee061d1009c1f3135fb64eb7"


class SuiteUnavailableError(Exception):
    """timm's source distribution cannot be had here."""


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visionmamba" / f"timm-{_VERSION}-tests"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_suite() -> Path:
    """Return timm's ``tests/test_models.py``.

    Raises:
        SuiteUnavailableError: It is not in the cache and cannot be downloaded.
    """
    suite = _cache() / "test_models.py"
    suite.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(suite.with_suffix(".lock")):  # one of a run's workers downloads, the others read
        if not suite.is_file() or _sha256(suite) != _SUITE_SHA256:
            _download_or_fail_alike(suite)
    return suite


def _download_or_fail_alike(suite: Path) -> None:
    """Download; what failed for one worker of a run fails for all, else they would not collect the same tests."""
    run, note = os.environ.get("PYTEST_XDIST_TESTRUNUID", "alone"), suite.with_suffix(".failed")
    if run != "alone" and note.is_file() and note.read_text().startswith(run):
        raise SuiteUnavailableError(note.read_text().removeprefix(run))
    try:
        _download(suite)
    except SuiteUnavailableError as error:
        note.write_text(f"{run}{error}")
        raise


def _download(suite: Path) -> None:
    with tempfile.TemporaryDirectory(dir=suite.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", f"timm=={_VERSION}", "--no-deps", "--no-binary", "timm"]
        options = ["--quiet", "--retries", "1", "--timeout", "20", "--dest", folder]
        completed = subprocess.run([*command, *options], capture_output=True, text=True)
        if completed.returncode:
            last = (completed.stderr.strip() or "pip failed").splitlines()[-1]
            raise SuiteUnavailableError(f"timm {_VERSION}'s source distribution cannot be downloaded: {last}")
        (sdist,) = Path(folder).glob("*.tar.gz")
        if _sha256(sdist) != _SDIST_SHA256:
            raise AssertionError(f"{sdist.name}: sha256 {_sha256(sdist)}, expected {_SDIST_SHA256}")
        with tarfile.open(sdist) as archive:
            content = archive.extractfile(_SUITE).read()
        fresh = Path(folder) / suite.name
        fresh.write_bytes(content)
        fresh.replace(suite)


def _is_sequence_model(name: str) -> bool:
    """Whether a model has one resolution throughout, as the suite's "non-standard" models have."""
    model = timm.create_model(name, device="meta")
    return len({level["reduction"] for level in model.feature_info}) == 1


def _with_frames(get_input_size):
    """Let the suite feed clips to models of videos; the size in timm's cfg is that of a frame."""

    def get(model=None, model_name="", target=None):
        channels, *size = get_input_size(model, model_name, target)
        model = model or timm.create_model(model_name, device="meta")
        frames = getattr(getattr(model, "model", model), "num_frames", None)  # features_only wraps the model
        return (channels, *size) if frames is None else (channels, frames, *size)

    return get


def load_suite(models: list[str]) -> ModuleType:
    """Import timm's suite, parametrised over models of this project in place of timm's.

    Args:
        models: Registered names.
    """
    sequence = [name for name in models if _is_sequence_model(name)]
    list_models = timm.list_models

    def ours(filter="", module="", pretrained=False, exclude_filters="", **kwargs):
        if pretrained:  # would download the weights
            return []
        chosen = sequence if "vit_*" in filter else models
        excluded = [*sequence, *exclude_filters] if "vit_*" in exclude_filters else exclude_filters
        if not isinstance(filter, list) and filter:  # timm's own families, by name
            chosen = [name for name in models if fnmatch(name, filter)]
        listed = list_models([*chosen, *(f"{name}.*" for name in chosen)], **kwargs) if chosen else []
        return [name for name in listed if name.split(".")[0] not in excluded]

    spec = importlib.util.spec_from_file_location("timm_test_models", fetch_suite())
    suite = importlib.util.module_from_spec(spec)
    with mock.patch("timm.list_models", ours), mock.patch("timm.list_pretrained", lambda *_args, **_kwargs: []):
        spec.loader.exec_module(suite)
    suite._get_input_size = _with_frames(suite._get_input_size)
    return suite
