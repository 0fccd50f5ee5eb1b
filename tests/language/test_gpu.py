"""Language models on a GPU: the same numbers as on the CPU, and CUDA graphs that decode as plain calls do."""

import pytest
import torch
from _lm_goldens import NAMES, language_golden, small_model

from visionmamba.language.training import Trainer, TrainingRun

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", NAMES)
def test_goldens(name):
    golden = language_golden(name)
    model = golden.model().cuda()
    with torch.no_grad():
        logits = model(golden.tokens("tokens").cuda()).logits
    torch.testing.assert_close(logits.cpu(), torch.from_numpy(golden.arrays["logits"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("graphs", [True, False])
def test_greedy_tokens(name, graphs):
    golden = language_golden(name)
    prompt = golden.tokens("prompt").cuda()
    model = golden.model().cuda()
    for _ in range(2):  # the second call reuses the graph and its cache
        tokens = model.generate(prompt, prompt.shape[1] + golden.info["new_tokens"], cg=graphs)
        expected = torch.from_numpy(golden.arrays["generated_tokens"])
        assert torch.equal(tokens[:, prompt.shape[1] :].cpu(), expected)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "hybrid", "mlp"])
def test_a_graph_serves_shorter_generations(kind):
    model = small_model(kind).cuda()
    for prompt_length, length in ((9, 30), (1, 12), (4, 30)):
        prompt = torch.randint(0, 250, (2, prompt_length), device="cuda")
        assert torch.equal(model.generate(prompt, length, cg=True), model.generate(prompt, length))


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_state_memory_is_constant_in_length(kind):
    model = small_model(kind).cuda()
    sizes = [
        sum(tensor.numel() for layer in model.allocate_inference_cache(1, length).values() for tensor in layer)
        for length in (64, 65536)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2", "S4D"])
def test_captured_steps_train_as_plain_ones(layer):
    """Two lengths: the second is captured with the optimizer's state of the first."""
    run = TrainingRun(
        layer=layer,
        options={"length": 24, "num_tokens": 4},
        curriculum=({"length": 8},),
        advance_at=0.0,
        d_model=32,
        batch=8,
        steps=12,
        eval_every=6,
        ssm_cfg={"headdim": 16, "d_state": 16} if layer == "Mamba2" else {},
    )
    plain, captured = Trainer(run, "cuda"), Trainer(run, "cuda", graph=True)
    for _ in range(2):
        expected, entry = plain.advance(), captured.advance()
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for result, weight in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(result, weight, rtol=1e-3, atol=1e-4)
