"""The models' goldens on a GPU: logits and gradient norms of the official implementations."""

import sys

import pytest
import torch
from golden import cases, golden

pytestmark = pytest.mark.gpu
FAMILIES = ("vim", "vmamba", "plainmamba", "localmamba", "efficient_vmamba", "mamba_nd")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions in float32, as on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(
    "name", [case.values[0] for family in FAMILIES for case in cases(family, "classification", "video")]
)
def test_golden(name, tmp_path):
    case = golden(name)
    model = case.create_model(tmp_path).cuda()
    logits = model(case.input.cuda())
    logits.float().pow(2).mean().backward()
    case.check_logits(logits.cpu())
    case.check_gradients(model.cpu(), sys.modules[type(model).__module__].official_state_dict)
