"""timm's own suite over our models: every micro model, and one full-size model of each family.

``VISIONMAMBA_TIMM_SUITE="vim_* vmamba_*"`` runs it over other models.
"""

import os

import pytest
import timm
from _timm_suite import SuiteUnavailableError, load_suite

from visionmamba.zoo import model_names

_FULL_SIZE = (
    "efficient_vmamba_tiny",
    "local_vim_tiny",
    "local_vssm_tiny",
    "mamba2d_small_patch8_224",
    "plainmamba_l1",
    "vim_tiny_patch16_224",
    "vmamba_tiny_s1l8",
)


def _models() -> list[str]:
    asked = os.environ.get("VISIONMAMBA_TIMM_SUITE", "").split()
    if not asked:
        return sorted([*model_names("test_*"), *_FULL_SIZE])
    return sorted({name for pattern in asked for name in model_names(pattern)})


def _cases(test) -> list[str]:
    """Return the models over which a test of the suite is parametrised."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    return next((mark.args[1] for mark in marks if mark.args[0] == "model_name"), [])


def _is_ours(test) -> bool:
    """Whether a test is one for our models, and not one for a certain model of timm's."""
    return bool(_cases(test)) and all(name.split(".")[0] in _MODELS for name in _cases(test))


_MODELS = _models()
try:
    _SUITE = load_suite(_MODELS)
except SuiteUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

cfg_device = _SUITE.cfg_device
_TESTS = {name: test for name, test in vars(_SUITE).items() if name.startswith("test_") and _is_ours(test)}
for _slowest in ("test_prune_intermediate_layers_contract", "test_model_backward_fx"):  # the first is not in timm's CI
    _names = _cases(_TESTS[_slowest])
    _names[:] = [pytest.param(name, marks=pytest.mark.slow) if name in _FULL_SIZE else name for name in _names]
globals().update(_TESTS)


@pytest.mark.skipif("VISIONMAMBA_TIMM_SUITE" in os.environ, reason="other models were asked for")
def test_the_suite_is_not_empty():
    """The generic tests of timm 1.0.31 that need no download."""
    assert set(_TESTS) >= {
        "test_model_forward",
        "test_model_backward",
        "test_model_default_cfgs",
        "test_model_default_cfgs_non_std",
        "test_model_forward_torchscript",
        "test_model_forward_features",
        "test_model_forward_intermediates_features",
        "test_model_forward_intermediates",
        "test_prune_intermediate_layers_contract",
        "test_model_forward_fx",
        "test_model_backward_fx",
        "test_model_forward_fx_torchscript",
    }
    assert timm.list_models("resnet18"), "timm's own list_models is back"
