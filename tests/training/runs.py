"""Small runs in fresh processes, forked from a server that has imported everything."""

import itertools
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

TINY = dict(
    model="test_vmamba", in_chans=1, batch_size=16, epochs=3, lr=3e-3, warmup_epochs=1, scale=(0.7, 1.0), hflip=0.0,
    workers=0, device="cpu", deterministic=True,
)  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["visionmamba.training.run"])


def _kill_later(steps: int, seconds: float) -> None:
    """Let SIGKILL meet this process so many seconds after its training has done so many steps."""
    from visionmamba.training import Trainer

    take_step, done = Trainer._take_step, itertools.count(1)

    def counted(trainer, *arguments):
        loss = take_step(trainer, *arguments)
        if next(done) == steps:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return loss

    Trainer._take_step = counted


def _child(configs: list[dict], environment: dict, kill_after: tuple[int, float] | None) -> None:
    os.environ.update(environment)
    # a loader's workers leave when their parent is gone, which a fork server between the two would hide from them
    multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    import visionmamba  # noqa: F401
    from visionmamba.training import TrainConfig, Trainer
    from visionmamba.training.distributed import join_world, leave_world

    if kill_after:
        _kill_later(*kill_after)
    for config in (TrainConfig(**given) for given in configs):
        Trainer(config, join_world(config.device)).run()
    leave_world()


def start(config: dict, environment: dict | None = None, kill_after: tuple[int, float] | None = None):
    """Start a run; ``kill_after`` is a number of steps and the seconds from there to its SIGKILL."""
    return start_in_turn([config], environment, kill_after)


def start_in_turn(configs: list[dict], environment: dict | None = None, kill_after: tuple[int, float] | None = None):
    """Start a process that does one run after the other."""
    process = _context.Process(target=_child, args=(configs, environment or {}, kill_after))
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
