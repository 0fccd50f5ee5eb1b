"""What ``torch.load`` is told to admit from the Runner's checkpoints, and that it admits nothing else."""

import os
import pickle

import pytest
import torch

_REASON = 'needs OpenMMLab: pip install "visionmamba[openmmlab]"'
pytest.importorskip("visionmamba.openmmlab", reason=_REASON, exc_type=ImportError)

from mmengine.logging import HistoryBuffer  # noqa: E402

from visionmamba.openmmlab import allow_runner_checkpoints  # noqa: E402


@pytest.fixture(autouse=True)
def allowed():
    """The maintained mmengine admits the same for the time of a load, and takes it away from everybody after it."""
    allow_runner_checkpoints()


def test_a_log_is_read(tmp_path):
    history = HistoryBuffer()
    for value in (1.0, 2.0):
        history.update(value)
    torch.save({"message_hub": {"log_scalars": {"loss": history}}}, tmp_path / "iter_2.pth")
    loaded = torch.load(tmp_path / "iter_2.pth", weights_only=True)["message_hub"]["log_scalars"]["loss"]
    assert loaded.mean() == 1.5
    loaded.update(6.0)
    assert loaded.max() == 6.0


class Attribute:
    """Pickles as a look-up of an attribute."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


class Command:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    "content",
    [Attribute(HistoryBuffer, "__init__"), Attribute(torch.Tensor, "mean"), Command()],
    ids=["own", "other", "run"],
)
def test_anything_else_is_not(content, tmp_path):
    torch.save({"message_hub": content}, tmp_path / "iter_1.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "iter_1.pth", weights_only=True)
