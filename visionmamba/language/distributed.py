"""Tensor and context parallel language models on ``torch.distributed``: several processes compute what one would.

*Tensor parallel*: each rank holds some heads of every mixer. Mamba-2's ``in_proj`` packs z, x, B, C and dt into one
matrix, and its heads share groups, so its rows are picked by hand; the layers whose shards are plain blocks of rows or
columns (``out_proj``, the MLP's ``fc2``, the output layer) are sharded as DTensors by ``parallelize_module``.

*Context parallel*: each rank holds a stretch of the sequence. Only two things cross its border: the last ``d_conv - 1``
inputs of the convolution, and the state. The state that enters a rank is a decayed sum of what the earlier ranks add to
it, so one exchange of (P x N) states replaces a chain of waits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ..ops import causal_conv1d, ssd_scan
from ..ops.ssd.interface import state_after
from .attention import MHA, GatedMLP
from .mamba2 import Mamba2
from .model import MambaLMHeadModel
from .norms import RMSNormGated

__all__ = [
    "ContextParallelMamba2",
    "context_parallel",
    "gather_sequence",
    "shard_sequence",
    "sum_replicated_gradients",
    "tensor_parallel",
]


class _CopyToRanks(torch.autograd.Function):
    """The identity; its gradient is the sum over ranks, each of which used the input for its own heads."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, known to all; what each rank computes from it is its own, so gradients are summed too."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _GatherFromRanks(torch.autograd.Function):
    """The inputs of all ranks, stacked; gradients go back to the rank that each came from."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None


class _ShardedRMSNormGated(nn.Module):
    """Gated RMSNorm of channels that are spread over the ranks: one sum of squares a token crosses them."""

    def __init__(self, norm: RMSNormGated, channels: slice, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.eps, self.norm_before_gate, self.group = norm.eps, norm.norm_before_gate, group
        self.size = norm.weight.shape[0]
        self.weight = nn.Parameter(norm.weight.detach()[channels].clone())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        dtype, x, gate = x.dtype, x.float(), F.silu(z.float())
        scaled = x if self.norm_before_gate else x * gate
        squares = _SumOverRanks.apply(scaled.square().sum(-1, keepdim=True), self.group)
        normal = scaled * torch.rsqrt(squares / self.size + self.eps) * self.weight.float()
        return (normal * gate if self.norm_before_gate else normal).to(dtype)


def _keep(layer: nn.Linear | nn.Conv1d, rows: Tensor) -> None:
    """Keep some output rows of a layer."""
    layer.weight = nn.Parameter(layer.weight.detach()[rows].clone(), requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[rows].clone(), requires_grad=layer.bias.requires_grad)
    if isinstance(layer, nn.Conv1d):
        layer.in_channels = layer.out_channels = layer.groups = len(rows)
    else:
        layer.out_features = len(rows)


def _row_parallel(module: nn.Module, names: list[str], mesh: DeviceMesh) -> None:
    """Shard layers whose inputs are already split over the ranks; their outputs are sums over them."""
    plan = {name: RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()) for name in names}
    parallelize_module(module, mesh, plan)


def _copy_inputs(module: nn.Module, group: dist.ProcessGroup) -> None:
    module.register_forward_pre_hook(lambda _module, inputs: (_CopyToRanks.apply(inputs[0], group), *inputs[1:]))


def _blocks(sizes: list[int], picks: list[tuple[int, int]]) -> Tensor:
    """Indices of a (start, length) pick of each consecutive block."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return torch.cat([torch.arange(s + a, s + a + n) for s, (a, n) in zip(starts, picks, strict=True)])


def _divide(what: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise ValueError(f"mesh: expected a number of ranks that divides the {size} {what}, got {ranks}")
    return size // ranks


def _shard_mamba2(mixer: Mamba2, mesh: DeviceMesh) -> None:
    group, rank, ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    heads = _divide("heads", mixer.nheads, ranks)
    whole_groups = mixer.ngroups % ranks == 0
    if not whole_groups and mixer.ngroups != 1:
        raise ValueError(f"mesh: expected ngroups to be 1 or a multiple of the {ranks} ranks, got {mixer.ngroups}")
    groups = mixer.ngroups // ranks if whole_groups else 1
    d_mlp = mixer.d_inner - mixer.d_ssm
    mlp, d_ssm = _divide("MLP channels", d_mlp, ranks), heads * mixer.headdim
    states, all_states = groups * mixer.d_state, mixer.ngroups * mixer.d_state
    mine = (rank * states if whole_groups else 0, states)  # a single group's B and C are computed on every rank
    ssm = (rank * d_ssm, d_ssm)
    xBC = ([mixer.d_ssm, all_states, all_states], [ssm, mine, mine])
    rows = _blocks(
        [d_mlp, d_mlp, mixer.d_ssm, *xBC[0], mixer.nheads],
        [(rank * mlp, mlp), (rank * mlp, mlp), ssm, *xBC[1], (rank * heads, heads)],
    )
    _keep(mixer.in_proj, rows)
    _keep(mixer.conv1d, _blocks(*xBC))
    here = slice(rank * heads, (rank + 1) * heads)
    skip = slice(rank * d_ssm, (rank + 1) * d_ssm) if mixer.D_has_hdim else here
    for name, part in (("A_log", here), ("dt_bias", here), ("D", skip)):
        setattr(mixer, name, nn.Parameter(getattr(mixer, name).detach()[part].clone()))
    if mixer.rmsnorm:
        channels = slice(ssm[0], ssm[0] + d_ssm)
        if whole_groups:
            mixer.norm.weight = nn.Parameter(mixer.norm.weight.detach()[channels].clone())
        else:
            mixer.norm = _ShardedRMSNormGated(mixer.norm, channels, group)
    # out_proj's columns are [MLP | SSM]: bring each rank's together before they are cut into blocks
    order = torch.cat([_blocks([d_mlp, mixer.d_ssm], [(r * mlp, mlp), (r * d_ssm, d_ssm)]) for r in range(ranks)])
    mixer.out_proj.weight = nn.Parameter(mixer.out_proj.weight.detach()[:, order].clone())
    mixer._group_is_replicated = not whole_groups
    mixer.nheads, mixer.ngroups, mixer.d_ssm, mixer.d_inner = heads, groups, d_ssm, mlp + d_ssm
    _copy_inputs(mixer, group)
    _row_parallel(mixer, ["out_proj"], mesh)


def _shard_attention(mixer: MHA, mesh: DeviceMesh) -> None:
    rank, ranks = mesh.get_local_rank(), mesh.size()
    heads, kv = _divide("heads", mixer.num_heads, ranks), _divide("key heads", mixer.num_heads_kv, ranks)
    half, size = mixer.mlp_dim // 2, mixer.head_dim
    mlp = _divide("MLP channels", half, ranks)
    sizes = [mixer.num_heads * size, mixer.num_heads_kv * size, mixer.num_heads_kv * size]
    picks = [(rank * heads * size, heads * size), (rank * kv * size, kv * size), (rank * kv * size, kv * size)]
    _keep(mixer.in_proj, _blocks([*sizes, half, half], [*picks, (rank * mlp, mlp), (rank * mlp, mlp)]))
    if mixer.d_conv > 0:
        _keep(mixer.conv1d, _blocks(sizes, picks))
    order = torch.cat(
        [_blocks([sizes[0], half], [(r * heads * size, heads * size), (r * mlp, mlp)]) for r in range(ranks)]
    )
    mixer.out_proj.weight = nn.Parameter(mixer.out_proj.weight.detach()[:, order].clone())
    mixer.num_heads, mixer.num_heads_kv, mixer.mlp_dim = heads, kv, 2 * mlp
    _copy_inputs(mixer, mesh.get_group())
    _row_parallel(mixer, ["out_proj"], mesh)


def _shard_mlp(mlp: GatedMLP, mesh: DeviceMesh) -> None:
    rank, hidden = mesh.get_local_rank(), mlp.fc2.in_features
    size = _divide("MLP channels", hidden, mesh.size())
    _keep(mlp.fc1, _blocks([hidden, hidden], [(rank * size, size), (rank * size, size)]))
    _copy_inputs(mlp, mesh.get_group())
    _row_parallel(mlp, ["fc2"], mesh)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread the heads of a model's mixers, and its MLPs' and output layer's channels, over the ranks of a mesh.

    Every rank passes the same inputs and gets the same outputs, and the same gradients for what is not sharded. In
    mixers with one group of B and C, every rank computes these, and their gradients must be summed over the ranks
    (:func:`visionmamba.language.distributed.sum_replicated_gradients` does).

    Args:
        model: A :class:`MambaLMHeadModel` of Mamba-2, attention and MLP layers, or a module with such layers; the same
            on every rank. Changed in place.
        mesh: One-dimensional mesh of the ranks.

    Returns:
        ``model``.

    Raises:
        ValueError: The ranks do not divide the heads, groups or channels.
        TypeError: The model has a layer that cannot be spread.
    """
    sharders = {Mamba2: _shard_mamba2, MHA: _shard_attention, GatedMLP: _shard_mlp}
    layers = [module for module in model.modules() if type(module) in sharders]
    if not layers:
        raise TypeError(f"model: expected Mamba2, MHA or GatedMLP layers, got {type(model).__name__} without any")
    for layer in layers:
        sharders[type(layer)](layer, mesh)
    if isinstance(model, MambaLMHeadModel) and not model.config.tie_embeddings:
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    return model


def sum_replicated_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """After backward, sum over ranks the gradients of B's and C's rows where every rank computes the one group.

    Args:
        model: The tensor parallel model.
        mesh: Its mesh.
    """
    for mixer in model.modules():
        if isinstance(mixer, Mamba2) and getattr(mixer, "_group_is_replicated", False):
            _sum_group_rows(mixer, mesh)


def _sum_group_rows(mixer: Mamba2, mesh: DeviceMesh) -> None:
    d_mlp, states = mixer.d_inner - mixer.d_ssm, 2 * mixer.ngroups * mixer.d_state
    first = 2 * d_mlp + 2 * mixer.d_ssm
    for layer, start in ((mixer.in_proj, first), (mixer.conv1d, mixer.d_ssm)):
        for parameter in (layer.weight, layer.bias):
            if parameter is not None and parameter.grad is not None:
                part = parameter.grad[start : start + states].contiguous()
                dist.all_reduce(part, group=mesh.get_group())
                parameter.grad[start : start + states] = part


def shard_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return this rank's stretch of ``(B, L, ...)``.

    Raises:
        ValueError: The ranks do not divide the length.
    """
    length = _divide("tokens", x.shape[1], mesh.size())
    return x[:, mesh.get_local_rank() * length : (mesh.get_local_rank() + 1) * length]


def gather_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the whole sequence ``(B, L, ...)`` from every rank's stretch, differentiably."""
    return torch.cat(list(_GatherFromRanks.apply(x, mesh.get_group())), dim=1)


class ContextParallelMamba2(nn.Module):
    """Mamba-2 over a sequence whose stretches are on different ranks.

    Args:
        mixer: The layer; its parameters are used, the same on every rank.
        mesh: One-dimensional mesh of the ranks, in the order of the sequence.

    Source:
        Dao & Gu 2024, section 8.2 (sequence parallelism).
    """

    def __init__(self, mixer: Mamba2, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mixer = mixer
        self._group, self._rank, self._ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def forward(self, u: Tensor, inference_params=None) -> Tensor:
        """Run over this rank's stretch, ``(B, L / ranks, d_model)``; the result has its shape."""
        mixer = self.mixer
        gate, value, z, xBC, dt = mixer._split(mixer.in_proj(u))
        past = mixer.d_conv - 1
        if xBC.shape[1] < past:
            raise ValueError(f"u: expected at least {past} tokens on each rank, got {xBC.shape[1]}")
        ends = _GatherFromRanks.apply(xBC[:, -past:].contiguous(), self._group)  # (ranks, B, W - 1, channels)
        before = ends[self._rank - 1] if self._rank > 0 else torch.zeros_like(ends[0])
        # A rank that needs nothing must still take part in the exchange of gradients
        before = before + 0 * ends.sum()
        xBC, _ = causal_conv1d(
            xBC, mixer.conv1d.weight.squeeze(1).unsqueeze(0),
            None if mixer.conv1d.bias is None else mixer.conv1d.bias.unsqueeze(0), None, before.mT.unsqueeze(1),
        )  # fmt: skip
        x, B, C = mixer._heads(xBC)
        state = self._entering_state(x, dt, B)
        y, _ = ssd_scan(
            x, dt.unsqueeze(2), -torch.exp(mixer.A_log.float()).unsqueeze(0), B, C, mixer._skip().unsqueeze(0),
            None if mixer.rmsnorm else z.unflatten(-1, (mixer.nheads, mixer.headdim)),
            mixer.dt_bias.float().unsqueeze(0), state.unsqueeze(1), dt_limit=mixer.dt_limit,
            chunk_size=mixer.chunk_size,
        )  # fmt: skip
        return mixer.out_proj(mixer._finish(y, z, gate, value))

    def _entering_state(self, x: Tensor, dt: Tensor, B: Tensor) -> Tensor:
        """The state before this rank's stretch, (B, H, P, N), from what every rank adds to it."""
        mixer = self.mixer
        step = F.softplus(dt.float() + mixer.dt_bias.float()).clamp(*mixer.dt_limit)  # (B, L, H)
        x = x.reshape(*x.shape[:2], mixer.nheads, mixer.headdim).float()
        B = B.reshape(*B.shape[:2], mixer.ngroups, mixer.d_state).float()
        added, log_decay = state_after(x, step, -torch.exp(mixer.A_log.float()), B)
        states = _GatherFromRanks.apply(added, self._group)
        decays = _GatherFromRanks.apply(log_decay, self._group).exp()[..., None, None]
        state = 0 * (states.sum() + decays.sum()) + torch.zeros_like(added)
        for rank in range(self._rank):  # h <- decay over the rank's stretch * h + what the stretch adds
            state = decays[rank] * state + states[rank]
        return state


def context_parallel(model: MambaLMHeadModel, mesh: DeviceMesh) -> MambaLMHeadModel:
    """Let a Mamba-2 model run over a sequence whose stretches are on different ranks.

    Each rank passes its stretch of the tokens (:func:`shard_sequence`) and gets its stretch of the logits. Gradients of
    the parameters are each rank's share: sum them over the ranks, as for data parallelism.

    Args:
        model: A model of Mamba-2 and MLP layers, the same on every rank. Changed in place.
        mesh: One-dimensional mesh of the ranks, in the order of the sequence.

    Returns:
        ``model``.

    Raises:
        TypeError: The model has mixers other than Mamba-2.
    """
    for layer in model.backbone.layers:
        if not isinstance(layer.mixer, Mamba2):
            raise TypeError(f"model: expected Mamba2 mixers only, got {type(layer.mixer).__name__}")
        layer.mixer = ContextParallelMamba2(layer.mixer, mesh)
    return model
