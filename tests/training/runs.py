"""Small runs in fresh processes, forked from a server that has imported everything."""

import itertools
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import wait
from pathlib import Path

TINY = dict(
    model="test_vmamba", in_chans=1, batch_size=16, epochs=3, lr=3e-3, warmup_epochs=1, scale=(0.7, 1.0), hflip=0.0,
    workers=0, device="cpu", deterministic=True,
)  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["visionmamba.training.run"])


def _kill_later(steps: int, calls: int) -> None:
    """Let SIGKILL meet this process so many calls of functions after its training has done so many steps."""
    from visionmamba.training import Trainer

    take_step, done, called = Trainer._take_step, itertools.count(1), itertools.count(1)

    def count(_frame, event, _argument):
        if event in ("call", "c_call") and next(called) == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(trainer, *arguments):
        loss = take_step(trainer, *arguments)
        if next(done) == steps:
            sys.setprofile(count)
        return loss

    Trainer._take_step = counted


def _child(configs: list[dict], environment: dict, kill_after: tuple[int, int] | None) -> None:
    os.environ.update(environment)
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
    if kill_after:  # the run was shorter
        os.kill(os.getpid(), signal.SIGKILL)


def start(config: dict, environment: dict | None = None, kill_after: tuple[int, int] | None = None):
    """Start a run; ``kill_after`` are the arguments of :func:`_kill_later`."""
    return start_in_turn([config], environment, kill_after)


def start_in_turn(configs: list[dict], environment: dict | None = None, kill_after: tuple[int, int] | None = None):
    """Start a process that does one run after the other."""
    process = _context.Process(target=_child, args=(configs, environment or {}, kill_after))
    process.start()
    return process


def statuses(*processes) -> list[int]:
    """Wait for runs, for as long as none fails; return their exit statuses and leave none behind."""
    waiting = {process.sentinel: process for process in processes}
    try:
        while waiting and not any(process.exitcode for process in processes):
            for sentinel in wait(list(waiting)):
                waiting.pop(sentinel).join()
    finally:
        for process in waiting.values():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def finish(*processes) -> None:
    """Wait for runs that must succeed."""
    assert statuses(*processes) == [0] * len(processes)


def start_world(config: dict, size: int, environment: dict | None = None, nodes: bool = False) -> list:
    """Start a run of several processes on this machine, which meet as torchrun's do: in a store that is there first.

    ``nodes``: each takes itself for a machine of its own, which NCCL asks of ranks that share a GPU.
    """
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {
        **(environment or {}),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
    }
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(0 if nodes else rank)} for rank in range(size)]
    if nodes:
        ranks = [own | {"NCCL_HOSTID": own["RANK"], "NCCL_NET": "Socket"} for own in ranks]
    processes = [start(config, common | own) for own in ranks]
    processes[0].store = store  # is there as long as they are
    return processes


def weights(folder: Path) -> dict:
    """Return the weights at a run's end."""
    from safetensors.torch import load_file

    return load_file(folder / "last.safetensors")
