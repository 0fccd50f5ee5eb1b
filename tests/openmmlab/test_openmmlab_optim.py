"""Learning rates that decay by layers."""

import pytest
import torch.nn as nn

pytest.importorskip("mmengine", reason='needs OpenMMLab: pip install "visionmamba[openmmlab]"')
pytest.importorskip("mmcv", reason='needs OpenMMLab: pip install "visionmamba[openmmlab]"')

from mmengine.optim import build_optim_wrapper

from visionmamba.openmmlab import VisionMambaBackbone


class Detector(nn.Module):
    """A backbone of four blocks, and a head with a norm."""

    def __init__(self):
        super().__init__()
        self.backbone = VisionMambaBackbone("test_vim", depth=4, out_indices=[3])
        self.head = nn.Sequential(nn.Linear(2, 2))
        self.head.norm = nn.LayerNorm(2)


def settings(model, **paramwise):
    """Return the learning rate and the weight decay of each parameter by name."""
    wrapper = build_optim_wrapper(
        model,
        dict(
            type="OptimWrapper",
            optimizer=dict(type="SGD", lr=1.0, weight_decay=0.5),
            constructor="LayerDecayOptimWrapperConstructor",
            paramwise_cfg=paramwise,
        ),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in wrapper.param_groups
        for parameter in group["params"]
        if id(parameter) in names
    }


def test_rates_decay_towards_the_input():
    model = Detector()
    found = settings(model, layer_decay=0.5, custom_keys=dict(norm=dict(decay_mult=0.0), pos_embed=dict(lr_mult=0.1)))
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (rate, decay) in found.items():
        if name.startswith("backbone.model.blocks."):
            expected = 0.5 ** (4 - int(name.split(".")[3]))
        elif name.startswith("backbone."):
            expected = 0.5**5 * (0.1 if "pos_embed" in name else 1.0)
        else:
            expected = 1.0
        assert rate == pytest.approx(expected), name
        assert decay == (0.0 if "norm" in name else 0.5), name
    assert len({rate for rate, _ in found.values()}) == 7


@pytest.mark.parametrize("paramwise", [{}, dict(layer_decay=0.0), dict(layer_decay=1.5)])
def test_layer_decay_is_needed(paramwise):
    with pytest.raises(ValueError, match="expected a layer_decay above 0, at most 1, got"):
        settings(Detector(), **paramwise)
