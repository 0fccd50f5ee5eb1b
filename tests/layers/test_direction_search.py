"""The direction search: a supernet's weights, the directions they choose, and the model that is built from them."""

import pytest
import timm
import torch
import torch.nn.functional as F

import visionmamba  # noqa: F401  registers the models
from visionmamba.layers import LOCAL_DIRECTIONS, chosen_directions, search_weights

MICRO = ("test_local_vim", "test_local_vmamba")


@pytest.mark.parametrize("name", MICRO)
def test_the_heaviest_directions_are_chosen(name):
    supernet = timm.create_model(name, search=True)
    merges = [module for key, module in supernet.named_modules() if key.endswith("ssm.merge")]
    preferred = [torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(len(merges))]
    for merge, order in zip(merges, preferred, strict=True):
        merge.weights.data[order] = torch.linspace(2, -2, 8)
    for number in (1, 4, 8):
        expected = [",".join(LOCAL_DIRECTIONS[k] for k in sorted(order[:number].tolist())) for order in preferred]
        assert chosen_directions(supernet, number) == expected
    shares = search_weights(supernet)
    layers = [key for key, module in supernet.named_modules() if key.split(".")[-1] == "mixer"]
    assert [f"{layer}.mixer" for layer in shares] == layers
    for layer, order in zip(shares.values(), preferred, strict=True):
        assert sum(layer.values()) == pytest.approx(1)
        assert max(layer, key=layer.get) == LOCAL_DIRECTIONS[order[0]]


@pytest.mark.parametrize("name", MICRO)
def test_a_trained_supernet_tells_a_model_that_can_be_built(name):
    """Training moves the weights, and the searched model walks what they chose."""
    torch.manual_seed(0)
    supernet = timm.create_model(name, search=True, num_classes=2)
    before = search_weights(supernet)
    optimizer = torch.optim.AdamW(supernet.parameters(), lr=1e-2)
    images = torch.rand(8, 3, 64, 64)
    images[4:, :, ::2] = 0  # striped rows
    for _ in range(3):
        loss = F.cross_entropy(supernet(images), torch.tensor([0, 1]).repeat_interleave(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert search_weights(supernet) != before
    chosen = chosen_directions(supernet)
    searched = timm.create_model(name, directions=chosen, num_classes=2)
    assert [module.path for module in searched.modules() if hasattr(module, "num_directions")] == chosen
    assert searched(images).shape == (8, 2)


def test_class_tokens_are_no_direction():
    supernet = timm.create_model("test_local_vim", search=True, class_token="middle", rope="")
    assert all(set(path.split(",")) < set(LOCAL_DIRECTIONS) for path in chosen_directions(supernet))


def test_bad_input():
    with pytest.raises(ValueError, match="supernet: expected a model built with search=True, got LocalVim without"):
        chosen_directions(timm.create_model("test_local_vim", device="meta"))
    supernet = timm.create_model("test_local_vim", search=True)
    with pytest.raises(ValueError, match="number: expected 1 to 8 directions, got 9"):
        chosen_directions(supernet, 9)
    supernet.blocks[1].mixer.ssm.merge.weights.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"finite weights of directions, .* in blocks\.1\.mixer\.ssm"):
        chosen_directions(supernet)
