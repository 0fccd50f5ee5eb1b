"""mamba_ssm's public names as its users call them: signatures, defaults, state-dict names, and what they compute."""

import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from visionmamba import language, ops
from visionmamba.language import Block, GatedMLP, Mamba, MixerModel, RMSNorm, create_block
from visionmamba.language.attention import MHA
from visionmamba.ops import mamba_inner_fn, rms_norm_fn, selective_scan_fn

_NORM = "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, "
_NORM += "prenorm=False, residual_in_fp32=False, zero_centered_weight=False"
_GATED = "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True"
_SCAN = "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
_LAYERS = "ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-05, rms_norm=False, "

# mamba_ssm 2.3: positional order and defaults. What ours take besides must come after, with a default.
FUNCTIONS = {
    "selective_scan_fn": _SCAN,
    "selective_scan_ref": _SCAN,
    "mamba_inner_fn": "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, "
    "out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, "
    "delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, "
    "b_c_dt_rms_eps=1e-06",
    "selective_state_update": "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
    "state_batch_indices=None",
    "mamba_chunk_scan_combined": "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
    "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
    "return_varlen_states=False",
    "mamba_split_conv1d_scan_combined": "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, "
    "initial_states=None, seq_idx=None, dt_limit=(0.0, inf), return_final_states=False, activation='silu', "
    "rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, "
    "norm_before_gate=True",
    "rmsnorm_fn": _GATED,
    "layernorm_fn": _GATED + ", is_rms_norm=False",
    "rms_norm_fn": _NORM,
    "layer_norm_fn": _NORM + ", is_rms_norm=False",
    "causal_conv1d_fn": "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
    "final_states_out=None, activation=None",
    "causal_conv1d_update": "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
    "conv_state_indices=None",
    "causal_conv1d_varlen_states": "x, cu_seqlens, state_len",
}
CLASSES = {
    "Mamba": "d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, dt_max=0.1, dt_init='random', "
    "dt_scale=1.0, dt_init_floor=0.0001, conv_bias=True, bias=False, use_fast_path=True, layer_idx=None, device=None, "
    "dtype=None",
    "Mamba2": "d_model, d_state=128, d_conv=4, conv_init=None, expand=2, headdim=64, d_ssm=None, ngroups=1, "
    "A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, norm_before_gate=False, dt_min=0.001, dt_max=0.1, "
    "dt_init_floor=0.0001, dt_limit=(0.0, inf), bias=False, conv_bias=True, chunk_size=256, use_mem_eff_path=True, "
    "layer_idx=None, process_group=None, sequence_parallel=True, device=None, dtype=None",
    "MHA": "embed_dim, num_heads, num_heads_kv=None, head_dim=None, mlp_dim=0, qkv_proj_bias=True, out_proj_bias=True, "
    "softmax_scale=None, causal=False, layer_idx=None, d_conv=0, rotary_emb_dim=0, rotary_emb_base=10000.0, "
    "rotary_emb_interleaved=False, device=None, dtype=None",
    "GatedMLP": "in_features, hidden_features=None, out_features=None, activation=<silu>, bias=False, multiple_of=128, "
    "device=None, dtype=None",
    "RMSNorm": "hidden_size, eps=1e-05, dropout_p=0.0, zero_centered_weight=False, device=None, dtype=None",
    "RMSNormGated": "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None",
    "MixerModel": f"d_model, n_layer, d_intermediate, vocab_size, {_LAYERS}initializer_cfg=None, fused_add_norm=False, "
    "residual_in_fp32=False, device=None, dtype=None",
    "MambaLMHeadModel": "config, initializer_cfg=None, device=None, dtype=None",
    "InferenceParams": "max_seqlen, max_batch_size, seqlen_offset=0, batch_size_offset=0, "
    "key_value_memory_dict=<dict>, lengths_per_sample=None",
    "MambaConfig": "d_model=2560, d_intermediate=0, n_layer=64, vocab_size=50277, ssm_cfg=<dict>, "
    "attn_layer_idx=<list>, attn_cfg=<dict>, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, "
    "pad_vocab_size_multiple=8, tie_embeddings=True",
}
METHODS = {
    "Mamba.forward": "self, hidden_states, inference_params=None",
    "Mamba.step": "self, hidden_states, conv_state, ssm_state",
    "Mamba2.forward": "self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None",
    "Mamba2.step": "self, hidden_states, conv_state, ssm_state",
    "MHA.forward": "self, x, inference_params=None",
    "RMSNorm.forward": "self, x, residual=None, prenorm=False, residual_in_fp32=False",
    "Block.forward": "self, hidden_states, residual=None, inference_params=None, **mixer_kwargs",
    "MixerModel.forward": "self, input_ids, inference_params=None, **mixer_kwargs",
    "MambaLMHeadModel.forward": "self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0, "
    "**mixer_kwargs",
    "MambaLMHeadModel.from_pretrained": "pretrained_model_name, device=None, dtype=None, **kwargs",
    "MambaLMHeadModel.save_pretrained": "self, save_directory",
    "MambaLMHeadModel.tie_weights": "self",
    "MambaLMHeadModel.generate": "self, input_ids, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, "
    "return_dict_in_generate=False, output_scores=False, **kwargs",
    "InferenceParams.reset": "self, max_seqlen, max_batch_size",
    "create_block": f"d_model, d_intermediate, {_LAYERS}residual_in_fp32=False, fused_add_norm=False, layer_idx=None, "
    "device=None, dtype=None",
    "decode": "input_ids, model, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, repetition_penalty=1.0, "
    "eos_token_id=None, teacher_outputs=None, vocab_size=None, cg=False, enable_timing=False, output_scores=False, "
    "streamer=None",
    "sample": "logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0",
}
for _module in ("Mamba", "Mamba2", "MHA", "Block", "MixerModel", "MambaLMHeadModel"):
    METHODS[f"{_module}.allocate_inference_cache"] = "self, batch_size, max_seqlen, dtype=None, **kwargs"


def _text(parameter):
    """A parameter as it is written in the tables."""
    if parameter.kind is parameter.VAR_KEYWORD:
        return "**"
    default = parameter.default
    if default is parameter.empty:
        return parameter.name
    if callable(default):
        return f"{parameter.name}=<{default.__name__}>"
    factories = {"ssm_cfg": dict, "attn_layer_idx": list, "attn_cfg": dict, "key_value_memory_dict": dict}
    if "factory" in repr(default):
        return f"{parameter.name}=<{factories[parameter.name].__name__}>"
    return f"{parameter.name}={default!r}"


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        *((ops, name, expected) for name, expected in FUNCTIONS.items()),
        *((language, name, expected) for name, expected in (CLASSES | METHODS).items()),
    ],
    ids=lambda value: value if isinstance(value, str) and "," not in value and " " not in value else "",
)
def test_signatures(source, name, expected):
    item = source
    for part in name.split("."):
        item = getattr(item, part)
    ours = list(inspect.signature(item).parameters.values())
    wanted, _, catches_all = expected.partition(", **")
    texts = [_text(parameter) for parameter in ours]
    count = next((n for n in range(len(texts) + 1) if ", ".join(texts[:n]) == wanted), None)
    assert count is not None, f"{', '.join(texts)} does not begin with {wanted}"
    further = ours[count:]
    assert all(p.kind is p.VAR_KEYWORD or p.default is not p.empty for p in further)
    assert any(p.kind is p.VAR_KEYWORD for p in further) == bool(catches_all)


def test_the_page_of_imports():
    page = (Path(__file__).resolve().parents[2] / "docs" / "from_mamba_ssm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(from [^`]*)` \| `(from [^`]*)` \|$", page, flags=re.MULTILINE)
    assert len(rows) == 17
    for theirs, ours in rows:
        names = {}
        exec(ours, names)
        assert theirs.split(" import ")[1].rsplit(" as ", 1)[-1] == ours.split(" import ")[1]


@torch.no_grad()
def _inner_arguments(mixer, x):
    return {
        "xz": mixer.in_proj(x).transpose(1, 2), "conv1d_weight": mixer.conv1d.weight, "conv1d_bias": mixer.conv1d.bias,
        "x_proj_weight": mixer.x_proj.weight, "delta_proj_weight": mixer.dt_proj.weight,
        "out_proj_weight": mixer.out_proj.weight, "out_proj_bias": mixer.out_proj.bias, "A": -mixer.A_log.exp(),
        "D": mixer.D, "delta_bias": mixer.dt_proj.bias,
    }  # fmt: skip


def _inner_by_hand(a, B, C, norm):
    """The block with PyTorch's convolution and norm; ``B`` and ``C`` as they go into the scan."""
    x, z = a["xz"].chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), a["conv1d_weight"], a["conv1d_bias"], groups=x.shape[1]))
    projected = torch.einsum("rd,bdl->brl", a["x_proj_weight"], x)
    delta = torch.einsum("dr,brl->bdl", a["delta_proj_weight"], norm("dt", projected[:, :2]))
    y = selective_scan_fn(x, norm("delta", delta), a["A"], B(projected), C(projected), a["D"], z, a["delta_bias"], True)
    return F.linear(y.transpose(1, 2), a["out_proj_weight"], a["out_proj_bias"])


def test_mamba_inner_fn_is_the_module():
    torch.manual_seed(0)
    mixer, x = Mamba(24, d_state=5, bias=True), torch.randn(2, 9, 24)
    torch.testing.assert_close(mamba_inner_fn(**_inner_arguments(mixer, x)), mixer(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"x_proj_weight: expected 7 rows \(dt, B, C: \[2, 5, 0\]\)"):
        mamba_inner_fn(**_inner_arguments(mixer, x), C=torch.randn(48, 5))


@pytest.mark.parametrize("weight_of_dt", ["dt", "delta"])
def test_mamba_inner_fn_with_norms_and_biases(weight_of_dt):
    torch.manual_seed(1)
    a = _inner_arguments(Mamba(24, d_state=5), torch.randn(2, 9, 24))
    weights = {"b": torch.rand(5), "c": torch.rand(5), weight_of_dt: torch.rand(2 if weight_of_dt == "dt" else 48)}
    bias = {"b": torch.randn(5), "c": torch.randn(5)}

    def norm(name, rows):  # (B, D, L)
        rows = rows if name not in bias else rows + bias[name][:, None]
        if name not in weights:
            return rows
        return rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + 1e-3) * weights[name][:, None]

    expected = _inner_by_hand(a, lambda p: norm("b", p[:, 2:7]), lambda p: norm("c", p[:, 7:]), norm)
    out = mamba_inner_fn(
        **a, B_proj_bias=bias["b"], C_proj_bias=bias["c"], b_rms_weight=weights["b"], c_rms_weight=weights["c"],
        dt_rms_weight=weights[weight_of_dt], b_c_dt_rms_eps=1e-3,
    )  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_mamba_inner_fn_with_constant_and_complex_projections():
    torch.manual_seed(2)
    a = _inner_arguments(Mamba(24, d_state=5), torch.randn(2, 9, 24))
    B, x_proj = torch.randn(48, 5), a["x_proj_weight"]
    a["x_proj_weight"] = x_proj[[0, 1, *range(7, 12)]]
    expected = _inner_by_hand(a, lambda p: B, lambda p: p[:, 2:], lambda name, rows: rows)
    torch.testing.assert_close(mamba_inner_fn(**a, B=B), expected, rtol=1e-5, atol=1e-6)

    a |= {"A": torch.complex(a["A"], torch.randn(48, 5)), "x_proj_weight": torch.cat([x_proj, torch.randn(10, 48)])}

    def interleaved(rows):  # (B, 2N, L), rows by state and part, to (B, N, 2L)
        return torch.stack([rows[:, ::2], rows[:, 1::2]], dim=-1).flatten(2)

    expected = _inner_by_hand(
        a, lambda p: interleaved(p[:, 2:12]), lambda p: interleaved(p[:, 12:]), lambda name, rows: rows
    )
    torch.testing.assert_close(mamba_inner_fn(**a), expected, rtol=1e-5, atol=1e-6)


def test_backbone_by_itself():
    """mamba_ssm's arguments of the backbone and of a layer, its state-dict names, and its scale with MLPs."""
    torch.manual_seed(0)
    model = MixerModel(24, 2, 32, 50, ssm_cfg={"layer": "Mamba2", "headdim": 8}, attn_layer_idx=[1],
                       attn_cfg={"num_heads": 4, "causal": True}, norm_epsilon=1e-3, rms_norm=True)  # fmt: skip
    names = {name.split(".", 2)[-1] for name, _ in model.named_parameters() if name.startswith("layers.0.")}
    mixer = {
        "A_log",
        "D",
        "dt_bias",
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "norm.weight",
        "out_proj.weight",
    }
    assert names == {f"mixer.{n}" for n in mixer} | {"norm.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert {"embedding.weight", "norm_f.weight", "layers.1.mixer.in_proj.bias"} <= set(model.state_dict())
    assert model.norm_f.eps == model.layers[0].norm2.eps == 1e-3
    for layer in model.layers:
        bound = layer.mlp.fc2.in_features**-0.5 / 2  # two layers with two branches each
        assert 0.9 * bound < layer.mlp.fc2.weight.abs().max() <= bound
    assert model(torch.randint(0, 50, (2, 7))).shape == (2, 7, 24)
    assert isinstance(create_block(24, 0, attn_layer_idx=[3], attn_cfg={"num_heads": 3}, layer_idx=3).mixer, MHA)
    with pytest.raises(ValueError, match="expected layer 'Mamba1', 'Mamba2' or 'S4D', got 'Mamba7'"):
        create_block(24, 0, ssm_cfg={"layer": "Mamba7"})


@pytest.mark.parametrize(
    "norm_cls", [nn.LayerNorm, RMSNorm, nn.RMSNorm, partial(nn.LayerNorm, elementwise_affine=False)]
)
def test_blocks_take_any_norm(norm_cls):
    torch.manual_seed(0)
    block, x, stream = Block(24, Mamba, nn.Identity, norm_cls), torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    plain = {RMSNorm: partial(nn.RMSNorm, eps=1e-5)}.get(norm_cls, norm_cls)(24)
    wide = Block(24, lambda dim: nn.Identity(), norm_cls=norm_cls, residual_in_fp32=True)
    for residual in (None, stream):
        out, total = block(x, residual)
        torch.testing.assert_close(total, x if residual is None else x + stream)
        torch.testing.assert_close(out, block.mixer(plain(total)), rtol=1e-5, atol=1e-5)
    wide.mixer.forward = lambda hidden, inference_params: hidden
    out, total = wide.bfloat16()(x.bfloat16())
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)


def test_norm_module():
    torch.manual_seed(0)
    x, stream = torch.randn(3, 8), torch.randn(3, 8)
    norm = RMSNorm(8, eps=1e-3, zero_centered_weight=True, dropout_p=0.5)
    assert not norm.weight.any()
    nn.init.normal_(norm.weight)
    expected = (x + stream) * torch.rsqrt((x + stream).square().mean(-1, keepdim=True) + 1e-3) * (1 + norm.weight)
    out, total = norm.eval()(x, stream, prenorm=True)
    torch.testing.assert_close(out, expected)
    assert torch.equal(total, x + stream)
    assert torch.equal(out, rms_norm_fn(x, norm.weight, None, stream, eps=1e-3, zero_centered_weight=True))
    dropped = norm.train()(x, torch.zeros_like(x), prenorm=True)[1]
    assert {round(v, 4) for v in (dropped / x).flatten().tolist()} == {0.0, 2.0}


def test_mlp_with_another_activation():
    mlp, x = GatedMLP(8, 16, None, torch.tanh, multiple_of=8), torch.randn(2, 8)
    value, gate = mlp.fc1(x).chunk(2, dim=-1)
    torch.testing.assert_close(mlp(x), mlp.fc2(value * gate.tanh()))
