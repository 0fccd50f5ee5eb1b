"""Tensor and context parallel models equal one process: outputs, gradients; gloo on CPUs, NCCL on one GPU and two."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from visionmamba.language import MambaConfig, MambaLMHeadModel
from visionmamba.language.distributed import (
    context_parallel,
    gather_sequence,
    shard_sequence,
    sum_replicated_gradients,
    tensor_parallel,
)

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

CONFIGS = {
    "one_group": {"ssm_cfg": {"headdim": 8, "d_state": 8}},
    "groups": {"ssm_cfg": {"headdim": 8, "d_state": 8, "ngroups": 2, "bias": True}},
    "mlp_beside": {"ssm_cfg": {"headdim": 8, "d_state": 8, "d_ssm": 32, "D_has_hdim": True, "norm_before_gate": True}},
    "no_norm": {"ssm_cfg": {"headdim": 8, "d_state": 8, "rmsnorm": False}, "tie_embeddings": False},
    "no_norm_groups": {"ssm_cfg": {"headdim": 8, "d_state": 8, "rmsnorm": False, "ngroups": 4}},
    "hybrid": {
        "ssm_cfg": {"headdim": 8, "d_state": 8},
        "d_intermediate": 64,
        "attn_layer_idx": [1],
        "attn_cfg": {
            "num_heads": 4,
            "num_heads_kv": 2,
            "causal": True,
            "d_conv": 3,
            "rotary_emb_dim": 8,
            "mlp_dim": 256,
        },
        "tie_embeddings": False,
    },
}


def _model(name, mesh):
    torch.manual_seed(0)
    cfg = CONFIGS[name] | {"ssm_cfg": {"layer": "Mamba2"} | CONFIGS[name]["ssm_cfg"]}
    return MambaLMHeadModel(MambaConfig(d_model=32, n_layer=2, vocab_size=40, **cfg)).to(mesh.device_type)


def _tokens(mesh):
    return torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1)).to(mesh.device_type)


def _reference(name, tokens, mesh):
    model = _model(name, mesh)
    logits = model(tokens).logits
    logits.square().mean().backward()
    return model, logits.detach()


def _check_tensor_parallel(name, mesh):
    tokens = _tokens(mesh)
    reference, expected = _reference(name, tokens, mesh)
    model = tensor_parallel(_model(name, mesh), mesh)
    logits = model(tokens).logits
    logits.square().mean().backward()
    sum_replicated_gradients(model, mesh)
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-5)
    wanted = dict(reference.named_parameters())
    compared = 0
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        if gradient.shape == wanted[key].shape and "out_proj" not in key:  # out_proj's columns are in another order
            torch.testing.assert_close(
                gradient, wanted[key].grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )
            compared += 1
        elif "out_proj.weight" in key:
            torch.testing.assert_close(gradient.norm(), wanted[key].grad.norm(), rtol=1e-4, atol=1e-6)
    assert compared >= 3
    _check_shards(name, model, wanted, mesh)


def _check_shards(name, model, wanted, mesh):
    """z and x rows, heads and norm weights of the first layer, against the slices of one process."""
    mixer, rank = model.backbone.layers[0].mixer, mesh.get_local_rank()
    prefix = "backbone.layers.0.mixer."
    heads = slice(rank * mixer.nheads, (rank + 1) * mixer.nheads)
    for key in ("A_log", "dt_bias"):
        expected = wanted[prefix + key].grad[heads]
        torch.testing.assert_close(getattr(mixer, key).grad, expected, rtol=1e-4, atol=1e-6)
    full = wanted[prefix + "in_proj.weight"].grad
    d_mlp, all_mlp = mixer.d_inner - mixer.d_ssm, (mixer.d_inner - mixer.d_ssm) * mesh.size()
    torch.testing.assert_close(  # the last rows are dt's
        mixer.in_proj.weight.grad[-mixer.nheads :],
        full[len(full) - mixer.nheads * mesh.size() :][heads],
        rtol=1e-4,
        atol=1e-6,
    )
    z = full[2 * all_mlp + rank * mixer.d_ssm : 2 * all_mlp + (rank + 1) * mixer.d_ssm]
    torch.testing.assert_close(mixer.in_proj.weight.grad[2 * d_mlp : 2 * d_mlp + mixer.d_ssm], z, rtol=1e-4, atol=1e-6)
    if CONFIGS[name]["ssm_cfg"].get("ngroups", 1) == 1:
        states, all_ssm = 2 * mixer.d_state, mixer.d_ssm * mesh.size()
        mine = mixer.in_proj.weight.grad[2 * d_mlp + 2 * mixer.d_ssm :][:states]
        expected = full[2 * all_mlp + 2 * all_ssm :][:states]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    else:
        states = mixer.ngroups * mixer.d_state
        mine = mixer.in_proj.weight.grad[2 * d_mlp + 2 * mixer.d_ssm :][:states]
        expected = full[2 * all_mlp + 2 * mixer.d_ssm * mesh.size() :][rank * states : (rank + 1) * states]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def _check_context_parallel(name, mesh):
    tokens = _tokens(mesh)
    reference, expected = _reference(name, tokens, mesh)
    model = context_parallel(_model(name, mesh), mesh)
    logits = model(shard_sequence(tokens, mesh)).logits
    (logits.square().sum() / expected.numel()).backward()
    torch.testing.assert_close(gather_sequence(logits.detach(), mesh), expected, rtol=1e-4, atol=1e-5)
    for (key, parameter), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def _check_errors(name, mesh):
    with pytest.raises(ValueError, match="divides the 8 heads, got 3"):
        tensor_parallel(_model("one_group", mesh), mesh)
    with pytest.raises(ValueError, match="divides the 10 tokens, got 3"):
        shard_sequence(torch.zeros(1, 10), mesh)
    with pytest.raises(TypeError, match="expected Mamba2, MHA or GatedMLP layers"):
        tensor_parallel(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(TypeError, match="expected Mamba2 mixers only, got MHA"):
        context_parallel(_model("hybrid", mesh), mesh)


def _worker(rank, ranks, meeting, checks, device, gpus):
    torch.set_num_threads(1)
    if device == "cuda":
        if gpus < ranks:  # NCCL lets ranks of different hosts share a GPU
            os.environ |= {"NCCL_HOSTID": str(rank), "NCCL_NET": "Socket"}
        torch.cuda.set_device(rank % gpus)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", f"file://{meeting}", rank=rank, world_size=ranks)
    try:
        mesh = init_device_mesh(device, (ranks,))
        for check, name in checks:
            globals()[check](name, mesh)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def run(tmp_path):
    """Run checks in several processes, which meet in a file: no port that another test could take."""

    def run(ranks, checks, device="cpu", gpus=0):
        mp.spawn(_worker, (ranks, tmp_path / "meeting", checks, device, gpus), nprocs=ranks, daemon=True)

    return run


def test_tensor_parallel(run):
    run(2, [("_check_tensor_parallel", name) for name in CONFIGS])


def test_context_parallel_on_two_processes(run):
    run(2, [("_check_context_parallel", name) for name in ("groups", "mlp_beside", "no_norm")])


def test_three_processes(run):
    run(3, [("_check_context_parallel", "one_group"), ("_check_errors", "")])


_GPUS = pytest.mark.parametrize(
    "gpus", [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]
)


@pytest.mark.gpu
@_GPUS
@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_parallel_over_nccl(run, name, gpus):
    run(2, [("_check_tensor_parallel", name)], "cuda", gpus)


@pytest.mark.gpu
@_GPUS
@pytest.mark.parametrize("name", ["one_group", "groups", "mlp_beside", "no_norm"])
def test_context_parallel_over_nccl(run, name, gpus):
    run(2, [("_check_context_parallel", name)], "cuda", gpus)
