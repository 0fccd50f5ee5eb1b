"""Time the 1-D line on one GPU: SSD, decoding, and Mamba against a Transformer of equal size as sequences grow.

    python tools/bench_language.py ssd --output benchmarks/language
    python tools/bench_language.py decode --output benchmarks/language
    python tools/bench_language.py length --output benchmarks/language

``ssd`` takes the medians of Triton's ``do_bench`` (25 ms warm-up, 80 ms), bf16 activations, float32 A, D and bias; the
backward is that of all inputs; ``fwd_graph_ms`` is the forward as a CUDA graph, without launches. Each command writes a
JSON file; ``length`` also draws a plot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_ops import provenance

from visionmamba.language import MambaConfig, MambaLMHeadModel
from visionmamba.ops import mamba_chunk_scan_combined

_SSD_SHAPES = {
    "ssd_2k": (8, 2048, 32, 64, 128, 256),
    "ssd_16k": (1, 16384, 32, 64, 128, 256),
    "ssd_196": (128, 196, 12, 64, 64, 64),
}
"""Batch, length, heads, headdim, d_state, chunk_size."""

_MAMBA_130M = {"d_model": 768, "n_layer": 24, "vocab_size": 50277}


def _environment() -> dict[str, str]:
    import triton

    return provenance() | {"triton": triton.__version__}


def _ssd_inputs(batch: int, length: int, heads: int, head_dim: int, states: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator).requires_grad_()

    float32 = torch.float32
    return {
        "x": normal(batch, length, heads, head_dim), "dt": normal(batch, length, heads),
        "A": (-torch.rand(heads, device="cuda", generator=generator) - 1).requires_grad_(),
        "B": normal(batch, length, 1, states), "C": normal(batch, length, 1, states),
        "D": normal(heads, dtype=float32), "dt_bias": (normal(heads, dtype=float32).detach() - 4).requires_grad_(),
    }  # fmt: skip


def ssd() -> dict[str, Any]:
    """Forward and backward times of the three shapes, and their distance to a float32 run of the PyTorch backend."""
    from triton.testing import do_bench, do_bench_cudagraph

    from visionmamba.ops import backend

    results = {}
    for name, (*shape, chunk) in _SSD_SHAPES.items():
        inputs = _ssd_inputs(*shape)

        def call(inputs=inputs, chunk=chunk) -> torch.Tensor:
            return mamba_chunk_scan_combined(**inputs, chunk_size=chunk, dt_softplus=True)

        with torch.no_grad():
            forward = do_bench(call, warmup=25, rep=80, return_mode="median")
            kernels = do_bench_cudagraph(call, rep=40, return_mode="median")
        out = call()
        cotangent = torch.randn_like(out)
        tensors = list(inputs.values())

        def back(out=out, tensors=tensors, cotangent=cotangent) -> Any:
            return torch.autograd.grad(out, tensors, cotangent, retain_graph=True)

        backward = do_bench(back, warmup=25, rep=80, return_mode="median")

        def both(inputs=inputs, chunk=chunk, cotangent=cotangent) -> Any:
            # Leaves of its own: those above have accumulated gradients on another stream, which a capture refuses.
            leaves = {key: tensor.detach().requires_grad_() for key, tensor in inputs.items()}
            y = mamba_chunk_scan_combined(**leaves, chunk_size=chunk, dt_softplus=True)
            return torch.autograd.grad(y, list(leaves.values()), cotangent)

        all_kernels = do_bench_cudagraph(both, rep=40, return_mode="median")
        wide = {key: tensor.detach().float().requires_grad_() for key, tensor in inputs.items()}
        with backend("torch"):
            reference = mamba_chunk_scan_combined(**wide, chunk_size=chunk, dt_softplus=True)
            expected = torch.autograd.grad(reference, list(wide.values()), cotangent.float())
        errors = {"y": _relative(out, reference)}
        errors |= {key: _relative(g, e) for key, g, e in zip(wide, back(), expected, strict=True)}
        results[name] = {"fwd_ms": round(forward, 4), "bwd_ms": round(backward, 4)}
        graphs = {"fwd_graph_ms": round(kernels, 4), "bwd_graph_ms": round(all_kernels - kernels, 4)}
        results[name] |= graphs | {"relative_errors": errors}
        print(name, results[name], flush=True)
    return results


def _relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return round(((result.float() - expected.float()).norm() / expected.float().norm()).item(), 6)


def decode(new_tokens: int = 256) -> dict[str, Any]:
    """Tokens a second of a 130M Mamba and Mamba-2, with and without CUDA graphs; the state's size at two lengths."""
    results = {}
    for layer in ("Mamba1", "Mamba2"):
        config = MambaConfig(**_MAMBA_130M, ssm_cfg={"layer": layer}, pad_vocab_size_multiple=16)
        model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
        for batch in (1, 64):
            for graphs in (True, False):
                prompt = torch.randint(0, 50277, (batch, 128), device="cuda")
                lengths = (8, 8 + new_tokens // (1 if graphs else 4))
                model.generate(prompt, 128 + lengths[graphs], cg=graphs)  # the graph serves shorter ones, too
                torch.cuda.synchronize()
                times = []
                for length in lengths:
                    began = time.perf_counter()
                    model.generate(prompt, 128 + length, cg=graphs)
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - began)
                rate = batch * (length - 8) / (times[1] - times[0])
                key = f"{layer}_batch{batch}_{'graphs' if graphs else 'eager'}"
                results[key] = {"tokens_per_s": round(rate, 1), "ms_per_step": round(1e3 * batch / rate, 4)}
                print(key, results[key], flush=True)
        results[f"{layer}_state_bytes"] = {length: _state_bytes(model, length) for length in (128, 131072)}
    return results


def _state_bytes(model: MambaLMHeadModel, length: int) -> int:
    states = model.allocate_inference_cache(1, length).values()
    return sum(tensor.numel() * tensor.element_size() for layer in states for tensor in layer)


def _median_time(function: Callable[[], Any], repeats: int = 5) -> float:
    """Median milliseconds."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def _measure(function: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds as plain calls and as a CUDA graph, without launches; peak memory above what was there, in MiB."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plain = _median_time(function)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    times = {"ms": plain, "graph_ms": _median_time(graph.replay)}
    return {key: round(value, 3) for key, value in times.items()} | {"peak_mib": round(memory, 1)}


def length(output: Path) -> dict[str, Any]:
    """Forward time and memory of Mamba, Mamba-2 and a Transformer (SDPA, rotary, gated MLP) of 130M parameters."""
    common = {"d_model": 768, "vocab_size": 50277, "pad_vocab_size_multiple": 16}
    attention = {"num_heads": 12, "causal": True, "rotary_emb_dim": 64, "qkv_proj_bias": False, "out_proj_bias": False}
    configs = {
        "Mamba": MambaConfig(**common, n_layer=24),
        "Mamba-2": MambaConfig(**common, n_layer=24, ssm_cfg={"layer": "Mamba2"}),
        "Transformer": MambaConfig(
            **common, n_layer=13, d_intermediate=2048, attn_layer_idx=list(range(13)), attn_cfg=attention
        ),
    }
    results: dict[str, Any] = {}
    for name, config in configs.items():
        model = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
        size = sum(parameter.numel() for parameter in model.parameters())
        results[name] = {"parameters": size, "lengths": {}}
        for tokens in (2048, 4096, 8192, 16384, 32768, 65536, 131072):
            prompt = torch.randint(0, 50277, (1, tokens), device="cuda")
            with torch.inference_mode():
                measured = _measure(lambda m=model, p=prompt: m(p, num_last_tokens=1))
            results[name]["lengths"][tokens] = measured
            print(name, tokens, results[name]["lengths"][tokens], flush=True)
        del model
    _plot_lengths(results, output / "length.png")
    return results


def _plot_lengths(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, result in results.items():
        lengths = list(result["lengths"])
        label = f"{name} ({result['parameters'] / 1e6:.0f}M)"
        for axis, quantity in zip(axes, ("graph_ms", "peak_mib"), strict=True):
            axis.loglog(lengths, [result["lengths"][n][quantity] for n in lengths], "o-", label=label, base=2)
    axes[0].set(xlabel="tokens", ylabel="forward as a CUDA graph, ms")
    axes[1].set(xlabel="tokens", ylabel="memory of the forward, MiB")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ssd", "decode", "length"])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    run = {"ssd": ssd, "decode": decode, "length": lambda: length(options.output)}[options.what]
    results = {"environment": _environment(), options.what: run()}
    (options.output / f"{options.what}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
