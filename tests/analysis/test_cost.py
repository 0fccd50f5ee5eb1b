"""Costs of models and modules, and memory from shapes alone."""

import pytest
import timm
import torch
import torch.nn as nn

from visionmamba.analysis.cost import model_cost
from visionmamba.analysis.memory import activation_memory, parameter_memory


class TestMemory:
    def chain(self):
        return nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(4)))

    def test_inference_holds_input_and_output_of_one_layer(self):
        image = 3 * 8 * 8 * 4  # bytes
        assert activation_memory(self.chain(), (3, 8, 8)) == 3 * image  # the model's input, and two of a chain

    def test_training_keeps_what_backward_needs(self):
        image, weights = 3 * 8 * 8 * 4, 4 * 9 * 4
        peak = activation_memory(self.chain(), (3, 8, 8), training=True)
        assert 5 * image < peak < 9 * image + weights

    def test_views_and_writes_in_place_are_free(self):
        class Views(nn.Module):
            def forward(self, x):
                return x.flatten(1).unsqueeze(0).mul_(2).relu_().transpose(0, 1)

        assert activation_memory(Views(), (3, 8, 8)) == 3 * 8 * 8 * 4

    def test_parameters(self):
        assert parameter_memory(nn.BatchNorm1d(5)) == 4 * 5 * 4 + 8
        assert parameter_memory(nn.Linear(3, 2, dtype=torch.bfloat16)) == 2 * 8

    def test_training_mode_and_parameters_are_left_alone(self):
        model = self.chain().train()
        activation_memory(model, (3, 8, 8))
        assert model.training
        activation_memory(model.eval(), (3, 8, 8), training=True)
        assert not model.training
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["test_vim", "test_vmamba", "test_mamba3d"])
def test_cost_of_a_model(name):
    model = timm.create_model(name, device="meta")
    cost = model_cost(model, name=name)
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert cost.flops == cost.layers + cost.scan == sum(cost.by_operator.values())
    assert cost.flops_recurrence == cost.layers + cost.scan_recurrence
    assert 0 < cost.inference_bytes < cost.training_bytes
    assert cost.parameter_bytes >= 4 * cost.params
    top = [module for module in cost.modules if "." not in module.name]
    assert sum(module.flops for module in top) == pytest.approx(cost.flops, rel=0.01)  # the rest is the model's own


def test_memory_grows_linearly_with_the_number_of_pixels():
    small, large = (
        activation_memory(timm.create_model("vim_tiny_patch16_224", device="meta", img_size=size), (size, size))
        for size in (224, 896)
    )
    assert large / small == pytest.approx(16, rel=0.1)
