"""Processes of a run: who is who, how the model is wrapped, and what they agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn

from .config import ConfigError, TrainConfig

__all__ = ["World", "check_world", "join_world", "leave_world", "parallelize", "synchronizing"]


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Args:
        rank: This process's number.
        size: How many there are.
        device: This process's device.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return the sums of numbers over the processes."""
        if self.size == 1:
            return list(values)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


def join_world(device: str | None = None) -> World:
    """Join the processes that ``torchrun`` started, if it did.

    Args:
        device: Device type; by default the accelerator if there is one.

    Returns:
        The world; of one process without ``torchrun``.

    Raises:
        ConfigError: There is no such device.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else accelerator.type
    size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        target = torch.device(device)
        if size > 1 and target.type != "cpu":
            target = torch.device(target.type, int(os.environ["LOCAL_RANK"]))
            torch.accelerator.set_device_index(target.index)
        torch.empty(1, device=target)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"device: {device} cannot be used ({str(error).splitlines()[0]})") from error
    if size == 1:
        return World(0, 1, target)
    if not dist.is_initialized():
        device_id = None if target.type == "cpu" else target
        dist.init_process_group(dist.get_default_backend_for_device(target.type), device_id=device_id)
    return World(dist.get_rank(), dist.get_world_size(), target)


def leave_world() -> None:
    """Leave the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def check_world(config: TrainConfig, world: World) -> None:
    """Raise ConfigError unless a recipe fits the processes and their device."""
    parts = world.size * config.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size: {config.batch_size} images a step cannot be divided among {world.size} processes with "
            f"{config.accumulate} passes each"
        )
    if (config.mixup or config.cutmix) and config.batch_size // parts % 2:
        raise ConfigError(f"batch_size: mixup and cutmix pair images, and a pass has {config.batch_size // parts}")
    if not config.cuda_graph:
        return
    if world.device.type != "cuda":
        raise ConfigError(f"cuda_graph: expected a CUDA device, and the run is on {world.device}; leave the key out")
    if world.size > 1 and config.parallel == "fsdp":
        raise ConfigError("cuda_graph: parallel=fsdp gathers weights anew at every step; parallel=ddp can be replayed")


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks, FSDP's units: the members of every ``blocks`` of the model."""
    holders = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "blocks"]
    return [block for holder in holders for block in holder]


def parallelize(model: nn.Module, world: World, kind: str, precision: str) -> nn.Module:
    """Share a model's training among the processes.

    Args:
        model: The model, on this process's device.
        world: The processes.
        kind: ``ddp`` keeps the whole model in each process, ``fsdp`` shards weights, gradients and optimiser (FSDP2).
        precision: With ``fsdp`` and ``bf16`` gathered weights are bfloat16.

    Returns:
        The module to call in training; for ``fsdp`` the model itself, with sharded parameters.
    """
    if world.size == 1:
        return model
    if kind == "ddp":
        device_ids = None if world.device.type == "cpu" else [world.device]
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if precision == "bf16" else MixedPrecisionPolicy()
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def synchronizing(module: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients among the processes in the last of an optimiser step's backward passes only."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if last else module.no_sync():
            yield
    else:
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(last)
        yield
