"""Training on a GPU: a deterministic run that is left and resumed repeats one that is not, bit by bit."""

import pytest
import torch
from digit_folder import write_digits
from runs import TINY, finish, start_in_turn, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "model, precision",
    [("test_vmamba", "fp32"), ("test_vmamba", "fp16"), ("test_vim", "fp32"), ("test_vim", "bf16")],
)
def test_a_resumed_run_repeats_a_whole_one(model, precision, tmp_path):
    """In one process, which a device is slow to take up; tests on the CPU resume in another."""
    config = dict(
        TINY, data=str(write_digits(tmp_path / "digits", 64, 61)), model=model, precision=precision,
        device="cuda", sched="constant", warmup_epochs=0, ema_decay=0.8,
    )  # fmt: skip
    resumed = dict(config, out=str(tmp_path / "resumed"))
    finish(
        start_in_turn(
            [dict(config, out=str(tmp_path / "whole"), epochs=2), {**resumed, "epochs": 1}, {**resumed, "epochs": 2}]
        )
    )
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert all(torch.isfinite(value).all() for value in whole.values())
