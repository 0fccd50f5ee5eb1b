"""Language models against the official ones: layout, logits, gradients, greedy tokens, published sizes."""

import numpy as np
import pytest
import torch
from _lm_goldens import NAMES, document, language_golden

from visionmamba.language import MambaConfig, MambaLMHeadModel


@pytest.fixture(params=NAMES)
def golden(request):
    return language_golden(request.param)


def _statistics(tensor: torch.Tensor) -> np.ndarray:
    x = tensor.detach().double()
    first, last = x.flatten()[0], x.flatten()[-1]
    return torch.stack([x.mean(), x.std(correction=0), x.abs().max(), x.norm(), first, last]).numpy()


def test_layout(golden):
    model = MambaLMHeadModel(golden.config())
    assert [[key, list(tensor.shape)] for key, tensor in model.state_dict().items()] == golden.info["keys"]
    assert sum(p.numel() for p in model.parameters()) == golden.info["param_count"]


def test_logits_and_residual_stream(golden):
    model = golden.model()
    stream, mixed = [], []
    model.backbone.embedding.register_forward_hook(lambda _m, _i, out: stream.append(out))
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda _m, _i, out: stream.append(out[0] + out[1]))
        layer.mixer.register_forward_hook(lambda _m, _i, out: mixed.append(out))
    model.lm_head.register_forward_pre_hook(lambda _m, inputs: stream.append(inputs[0]))
    with torch.no_grad():
        logits = model(golden.tokens("tokens")).logits
    tolerance = 4 * golden.info["logits_f32_err"]
    assert np.abs(logits.numpy() - golden.arrays["logits"]).max() <= tolerance
    for tensors, expected in ((stream, golden.arrays["feat_stats"]), (mixed, golden.arrays["mixer_stats"])):
        np.testing.assert_allclose([_statistics(t) for t in tensors], expected, rtol=1e-5, atol=1e-5)


def test_gradients(golden):
    model = golden.model()
    model(golden.tokens("tokens")).logits.float().pow(2).mean().backward()
    parameters = dict(model.named_parameters())
    norms = [parameters[key].grad.norm().item() for key in golden.info["grad_keys"]]
    tolerance = max(1e-5, 4 * golden.info["grad_norm_rel_err"])
    np.testing.assert_allclose(norms, golden.arrays["grad_norms"], rtol=tolerance)


def test_greedy_tokens(golden):
    prompt = golden.tokens("prompt")
    new = golden.info["new_tokens"]
    output = golden.model().generate(prompt, prompt.shape[1] + new, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences[:, : prompt.shape[1]], prompt)
    assert np.array_equal(output.sequences[:, prompt.shape[1] :].numpy(), golden.arrays["generated_tokens"])
    tolerance = 4 * golden.info["logits_f32_err"] + 1e-5
    np.testing.assert_allclose(output.scores[0].numpy(), golden.arrays["gen_logits_first"], atol=tolerance)
    np.testing.assert_allclose(output.scores[-1].numpy(), golden.arrays["gen_logits_last"], atol=tolerance)


@pytest.mark.parametrize("name", document("published_layouts")["models"])
def test_published_layouts(name):
    layout = document("published_layouts")["models"][name]
    config = MambaConfig.from_dict(layout["config"])
    assert config.to_dict() == layout["config_with_defaults"]
    with torch.device("meta"):
        model = MambaLMHeadModel(config)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = dict(layout["top_keys"])
    for index in range(config.n_layer):
        keys = "attn_layer_keys" if index in config.attn_layer_idx else "layer_keys"
        expected |= {f"backbone.layers.{index}.{key}": shape for key, shape in layout[keys]}
    assert shapes == expected
    assert len(shapes) == layout["n_keys"]
    assert sum(p.numel() for p in model.parameters()) == layout["param_count"]
