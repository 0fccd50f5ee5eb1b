"""Small runs in fresh processes, forked from a server that has imported everything."""

import multiprocessing
import os
import socket
from pathlib import Path

TINY = dict(
    model="test_vmamba", in_chans=1, batch_size=16, epochs=3, lr=3e-3, warmup_epochs=1, scale=(0.7, 1.0), hflip=0.0,
    workers=0, device="cpu", deterministic=True,
)  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["visionmamba.training.run"])


def _child(configs: list[dict], environment: dict) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    import visionmamba  # noqa: F401
    from visionmamba.training import TrainConfig, Trainer
    from visionmamba.training.distributed import join_world, leave_world

    for config in (TrainConfig(**given) for given in configs):
        Trainer(config, join_world(config.device)).run()
    leave_world()


def start(config: dict, environment: dict | None = None):
    """Start a run."""
    return start_in_turn([config], environment)


def start_in_turn(configs: list[dict], environment: dict | None = None):
    """Start a process that does one run after the other."""
    process = _context.Process(target=_child, args=(configs, environment or {}))
    process.start()
    return process


def finish(*processes) -> None:
    """Wait for runs that must succeed."""
    for process in processes:
        process.join(300)
        assert process.exitcode == 0


def start_world(config: dict, size: int, environment: dict | None = None) -> list:
    """Start a run of several processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = {**(environment or {}), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [start(config, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]


def weights(folder: Path) -> dict:
    """Return the weights at a run's end."""
    from safetensors.torch import load_file

    return load_file(folder / "last.safetensors")
