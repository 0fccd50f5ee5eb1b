"""Training on a GPU: a deterministic run that is left and resumed repeats one that is not, bit by bit."""

import pytest
import torch
from digit_folder import write_digits
from runs import TINY, finish, start, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["test_vmamba", "test_vim"])
def test_a_resumed_run_repeats_a_whole_one(model, precision, tmp_path):
    config = dict(
        TINY, data=str(write_digits(tmp_path / "digits", 64, 61)), model=model, precision=precision, device="cuda",
        sched="constant", warmup_epochs=0, ema_decay=0.8,
    )  # fmt: skip
    finish(start(dict(config, out=str(tmp_path / "whole"), epochs=2)))
    finish(start(dict(config, out=str(tmp_path / "resumed"), epochs=1)))
    finish(start(dict(config, out=str(tmp_path / "resumed"), epochs=2)))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert all(torch.isfinite(value).all() for value in whole.values())
