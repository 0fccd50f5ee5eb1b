"""Where a model's time on a GPU goes: ``python tools/profile_model.py MODEL [--train] [--batch N]``.

Prints the time of each kernel, and of each operator by its shapes with the bytes of its tensors: what it reads and
writes at least, and the time that they take at the memory's measured speed. An operator whose time is near that floor
can only be made faster by leaving memory traffic out.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import visionmamba  # noqa: F401  (registers the models)

_ITEM_SIZES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "int": 4, "long int": 8}


def copy_bandwidth() -> float:
    """Return the bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * source.nbytes / (start.elapsed_time(end) / 1e3)


def input_bytes(event) -> int:
    """Return the bytes of an operator's tensor arguments, as the profiler recorded their shapes and types."""
    total = 0
    for shape, kind in zip(event.input_shapes, event.input_dtypes or (), strict=False):
        if shape and kind in _ITEM_SIZES and not isinstance(shape[0], list):
            count = _ITEM_SIZES[kind]
            for size in shape:
                count *= size
            total += count
    return total


def collect(step) -> tuple[dict[str, list[float]], dict[tuple[str, str], list[float]]]:
    """Run a step under the profiler.

    Returns:
        Milliseconds and calls by kernel; and milliseconds, calls and bytes of arguments by operator and shapes.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as record:
        step()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    operators: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0, 0])
    for event in record.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name][0] += event.device_time / 1e3
            kernels[event.name][1] += 1
        elif event.self_device_time_total > 0:
            entry = operators[event.name, str(event.input_shapes)]
            entry[0] += event.self_device_time_total / 1e3
            entry[1] += 1
            entry[2] += input_bytes(event) if hasattr(event, "input_dtypes") else 0
    return kernels, operators


def main() -> None:
    """Read the command line, profile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--top", type=int, default=25, help="lines of each table")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not timm.is_model(arguments.model):
        parser.error(f"model: expected the name of a timm model, got {arguments.model!r}")
    if not torch.cuda.is_available():
        parser.exit(1, "profile_model needs a CUDA device\n")
    model = timm.create_model(arguments.model).cuda().train(arguments.train)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device="cuda")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(arguments.train), torch.autocast("cuda", torch.bfloat16):
            out = model(x)
        if arguments.train:
            out.float().square().mean().backward()

    for _ in range(3):
        step()
    bandwidth = copy_bandwidth()
    kernels, operators = collect(step)
    total, calls = (sum(entry[i] for entry in kernels.values()) for i in range(2))
    ranked = sorted(operators.items(), key=lambda item: -item[1][0])
    if arguments.json:
        rows = [
            dict(op=op, shapes=shapes, ms=time, calls=count, argument_bytes=size)
            for (op, shapes), (time, count, size) in ranked
        ]
        result = dict(total_ms=total, kernels=kernels, operators=rows, bytes_per_second=bandwidth)
        print(json.dumps(result))
        return
    print(f"{arguments.model}: {total:.2f} ms in {calls} kernels; a copy moves {bandwidth / 1e12:.2f} TB/s\n")
    for name, (time, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[: arguments.top]:
        print(f"{time:9.3f} ms {count:5d}x  {name[:100]}")
    print("\nBy operator; the floor is the time to read its arguments once\n")
    for (op, shapes), (time, count, size) in ranked[: arguments.top]:
        print(f"{time:9.3f} ms {count:5d}x  floor {1e3 * size / bandwidth:8.3f} ms  {op} {shapes[:110]}")


if __name__ == "__main__":
    main()
