"""Mamba, Mamba-2 and attention modules: steps, caches, states, packed sequences, options."""

from itertools import pairwise

import pytest
import torch
from _lm_goldens import small_model

from visionmamba.language import MHA, InferenceParams, Mamba, Mamba2

MIXERS = {
    "mamba": lambda **k: Mamba(24, d_state=5, d_conv=3, bias=True, **k),
    "mamba2": lambda **k: Mamba2(24, d_state=8, headdim=12, ngroups=2, **k),
    "mamba2_mlp": lambda **k: Mamba2(24, d_state=8, headdim=8, d_ssm=32, D_has_hdim=True, norm_before_gate=True, **k),
    "mamba2_no_norm": lambda **k: Mamba2(24, d_state=8, headdim=12, rmsnorm=False, dt_limit=(0.01, 0.05), **k),
    "mha": lambda **k: MHA(24, 4, num_heads_kv=2, causal=True, rotary_emb_dim=4, **k),
    "mha_conv": lambda **k: MHA(
        24, 3, head_dim=10, mlp_dim=200, causal=True, d_conv=3, rotary_emb_dim=6, rotary_emb_interleaved=True, **k
    ),
}


@pytest.fixture(params=MIXERS)
def mixer(request):
    torch.manual_seed(0)
    module = MIXERS[request.param](layer_idx=0)
    for parameter in module.parameters():  # step sizes and decays that matter within a few tokens
        if parameter.dim() == 1 and not getattr(parameter, "_no_weight_decay", False):
            torch.nn.init.normal_(parameter, std=0.5)
    return module


def _run_in_pieces(mixer, x, pieces):
    parameters = InferenceParams(max_seqlen=x.shape[1], max_batch_size=x.shape[0])
    outputs = []
    for piece in x.split(pieces, dim=1):
        outputs.append(mixer(piece, inference_params=parameters))
        parameters.seqlen_offset += piece.shape[1]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("pieces", [[9, 1, 1, 1, 1], [1] * 13, [2, 7, 1, 3], [13]], ids=str)
@torch.no_grad()
def test_cache_equals_one_pass(mixer, pieces):
    x = torch.randn(2, 13, 24)
    torch.testing.assert_close(_run_in_pieces(mixer, x, pieces), mixer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cache_rows_can_be_a_part_of_the_batch(mixer):
    x = torch.randn(3, 6, 24)
    parameters = InferenceParams(max_seqlen=6, max_batch_size=3)
    outputs = []
    for row in range(3):
        parameters.batch_size_offset, parameters.seqlen_offset = row, 0
        first = mixer(x[row : row + 1, :4], inference_params=parameters)
        parameters.seqlen_offset = 4
        outputs.append(torch.cat([first, mixer(x[row : row + 1, 4:], inference_params=parameters)], 1))
    torch.testing.assert_close(torch.cat(outputs), mixer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bounds", [[0, 5, 6, 17, 20], [0, 20]], ids=str)
def test_packed_sequences_do_not_leak(mixer, bounds):
    x = torch.randn(1, 20, 24, requires_grad=True)
    packed = mixer(x, cu_seqlens=torch.tensor(bounds))
    alone = torch.cat([mixer(x[:, a:b]) for a, b in pairwise(bounds)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(packed)
    gradients = [torch.autograd.grad(y, [x, *mixer.parameters()], cotangent) for y in (packed, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_seq_idx_of_a_batch(mixer):
    x = torch.randn(2, 9, 24)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    packed = mixer(x, seq_idx=seq_idx)
    for row in range(2):
        bounds = [0, *(torch.diff(seq_idx[row]).nonzero().squeeze(1) + 1).tolist(), 9]
        alone = [mixer(x[row : row + 1, a:b]) for a, b in pairwise(bounds)]
        torch.testing.assert_close(packed[row : row + 1], torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bounds", [[0, 10], [1, 20], [0, 12, 12, 20], [0, 15, 10, 20]])
def test_cu_seqlens_must_cover(mixer, bounds):
    with pytest.raises(ValueError, match="cu_seqlens: expected increasing boundaries from 0 to 20 tokens"):
        mixer(torch.randn(1, 20, 24), cu_seqlens=torch.tensor(bounds))


def test_mamba2_takes_no_process_group():
    Mamba2(24, headdim=8, process_group=None, sequence_parallel=False)
    with pytest.raises(ValueError, match=r"process_group: expected None; visionmamba\.language"):
        Mamba2(24, headdim=8, process_group=object())


def test_packed_sequences_need_a_batch_of_one(mixer):
    with pytest.raises(ValueError, match="batch of 1, got a batch of 2"):
        mixer(torch.randn(2, 20, 24), cu_seqlens=torch.tensor([0, 20]))
    with pytest.raises(ValueError, match="seq_idx: expected shape"):
        mixer(torch.randn(2, 20, 24), seq_idx=torch.zeros(1, 20, dtype=torch.int32))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba2_mlp"])
def test_states_can_be_passed_on_with_gradients(name):
    torch.manual_seed(0)
    mixer = MIXERS[name]()
    x = torch.randn(2, 11, 24, requires_grad=True)
    first, states = mixer(x[:, :6], return_final_states=True)
    second, last = mixer(x[:, 6:], initial_states=states, return_final_states=True)
    whole, expected = mixer(x, return_final_states=True)
    pieces = torch.cat([first, second], dim=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(whole)
    gradients = [torch.autograd.grad(y, [x, *mixer.parameters()], cotangent) for y in (pieces, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_mamba2_takes_flattened_tokens():
    torch.manual_seed(0)
    mixer, x = MIXERS["mamba2"](), torch.randn(2, 7, 24)
    torch.testing.assert_close(mixer(x.flatten(0, 1), seqlen=7).unflatten(0, (2, 7)), mixer(x))


def test_initialisation_follows_the_published_ranges():
    torch.manual_seed(0)
    mamba, mamba2 = Mamba(256, dt_min=0.01, dt_max=0.02), Mamba2(256, headdim=8, A_init_range=(2, 3), conv_init=0.1)
    step = torch.nn.functional.softplus(mamba.dt_proj.bias)
    assert 0.01 <= step.min() < 0.011 and 0.019 < step.max() <= 0.0201
    torch.testing.assert_close(mamba.A_log.exp()[0], torch.arange(1.0, 17.0))
    assert mamba2.A_log.exp().min() >= 2 and mamba2.A_log.exp().max() <= 3
    assert mamba2.conv1d.weight.abs().max() <= 0.1
    assert (mamba2.D == 1).all() and mamba2.dt_bias._no_weight_decay
    constant = Mamba(64, dt_init="constant", dt_scale=2.0).dt_proj.weight
    torch.testing.assert_close(constant, torch.full_like(constant, 2.0 * 4**-0.5))


def test_residual_branches_are_scaled_down():
    model = small_model("mlp", n_layer=9, attn_layer_idx=[])
    bound = (128**-0.5) / 3  # kaiming-uniform with a = sqrt(5) is 1 / sqrt(fan_in)
    for layer in model.backbone.layers:
        assert layer.mixer.out_proj.weight.abs().max() <= bound
        assert layer.mlp.fc2.weight.abs().max() > 0.9 * bound
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mamba2(24, headdim=7), "headdim: expected a divisor of the 48 SSM channels, got 7"),
        (lambda: Mamba2(24, headdim=12, ngroups=3), "ngroups: expected a divisor of the 4 heads, got 3"),
        (lambda: Mamba(24, dt_init="zero"), "dt_init: expected 'random' or 'constant', got 'zero'"),
        (lambda: MHA(24, 5), "num_heads: expected a divisor of 24 channels, got 5"),
        (lambda: MHA(24, 4, num_heads_kv=3), "num_heads_kv: expected a divisor of the 4 heads, got 3"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_calls():
    mamba = Mamba(24)
    with pytest.raises(ValueError, match="layer_idx: expected an index"):
        mamba(torch.randn(1, 3, 24), inference_params=InferenceParams(4, 1))
    with pytest.raises(ValueError, match="expected one token a step, got 3"):
        mamba.step(torch.randn(1, 3, 24), *mamba.allocate_inference_cache(1, 1))
    with pytest.raises(ValueError, match="expected no states with packed sequences"):
        mamba(torch.randn(1, 3, 24), cu_seqlens=torch.tensor([0, 3]), return_final_states=True)
    with pytest.raises(ValueError, match="expected at most 1 rows, got 2 from row 0"):
        Mamba(24, layer_idx=0)(torch.randn(2, 3, 24), inference_params=InferenceParams(4, 1))
    with pytest.raises(ValueError, match="expected at most 4 tokens in the cache, got 5"):
        MHA(24, 4, layer_idx=0)(torch.randn(1, 5, 24), inference_params=InferenceParams(4, 1))


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "hybrid"])
def test_packed_models_do_not_leak(kind):
    model = small_model(kind)
    tokens, bounds = torch.randint(0, 250, (1, 30)), [0, 9, 10, 30]
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=torch.tensor(bounds)).logits
        alone = [model(tokens[:, a:b]).logits for a, b in pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_packed_prefill(kind):
    """Prompts of different lengths in one row fill a cache row each, and decoding goes on as a batch."""
    model, bounds = small_model(kind), [0, 9, 11, 12, 30]
    tokens, following = torch.randint(0, 250, (1, 30)), torch.randint(0, 250, (4, 1))
    parameters = InferenceParams(max_seqlen=32, max_batch_size=4)
    model(tokens, inference_params=parameters, cu_seqlens=torch.tensor(bounds))
    parameters.seqlen_offset = 1
    logits = model(following, inference_params=parameters).logits[:, 0]
    for row, (start, end) in enumerate(pairwise(bounds)):
        expected = model(torch.cat([tokens[:, start:end], following[row : row + 1]], dim=1)).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.no_grad()
def test_packed_prefill_with_padding(kind):
    """Both ways to say what is packed: padding after the last boundary, and a cache row without a sequence."""
    model, bounds = small_model(kind), [0, 9, 11, 11]
    tokens, following = torch.randint(0, 250, (1, 15)), torch.randint(0, 250, (3, 1))
    seq_idx = torch.tensor([[0] * 9 + [1] * 2 + [-1] * 4], dtype=torch.int32)
    parameters = InferenceParams(max_seqlen=32, max_batch_size=3)
    packed = model(tokens, inference_params=parameters, seq_idx=seq_idx, cu_seqlens=torch.tensor(bounds)).logits
    parameters.seqlen_offset = 1
    logits = model(following, inference_params=parameters).logits[:, 0]
    for row, (start, end) in enumerate(pairwise(bounds)):
        expected = model(torch.cat([tokens[:, start:end], following[row : row + 1]], dim=1)).logits[0]
        torch.testing.assert_close(logits[row], expected[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed[0, start:end], expected[:-1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cu_seqlens: expected increasing boundaries from 0 to 15 tokens"):
        model(tokens, seq_idx=seq_idx, cu_seqlens=torch.tensor([0, 9, 16]))


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "mlp"])
def test_bfloat16_autocast_trains(kind):
    model = small_model(kind).train()
    tokens = torch.randint(0, 250, (2, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    torch.testing.assert_close(logits.float(), model(tokens).logits, rtol=0, atol=0.05)
