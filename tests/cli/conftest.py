"""Running the command line in this process."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from visionmamba.cli import main


class Finished(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """Run the command line; give its exit status and what it printed."""

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as finished:
            main([str(argument) for argument in arguments])
        return Finished(finished.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def images(tmp_path):
    """Three images: RGB, grey and with a palette and transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    paths = [tmp_path / name for name in ("rgb.png", "grey.jpg", "palette.gif")]
    Image.fromarray(pixels).save(paths[0])
    Image.fromarray(pixels[..., 0]).save(paths[1])
    Image.fromarray(pixels).convert("P").save(paths[2], transparency=0)
    return paths


@pytest.fixture
def checkpoint(tmp_path):
    """Random weights of test_vmamba for ImageNet's classes, nested as training code does."""
    import timm

    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save({"model": timm.create_model("test_vmamba").state_dict(), "epoch": 3}, path)
    return path
