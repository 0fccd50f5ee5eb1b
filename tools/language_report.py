"""Write ``benchmarks/language.md`` from the figures beside it.

``python tools/language_report.py --folder benchmarks/language`` reads ``ssd.json``, ``decode.json`` and ``length.json``
(``bench_language.py``), ``synthetic/*.jsonl`` and ``reduced.json`` (``train_synthetic.py``) and ``upstream.json``
(``upstream_tests.py``), and writes the page next to the folder. What is not there is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

_PEER = {"ssd_2k": (1.13, 3.37), "ssd_16k": (0.53, 3.31), "ssd_196": (0.90, 4.07)}
"""Forward and backward milliseconds of mamba_ssm 2.3.2's Triton kernels on an H200."""
_SHAPES = {"ssd_2k": "8, 2048, 32, 64, 128", "ssd_16k": "1, 16384, 32, 64, 128", "ssd_196": "128, 196, 12, 64, 64"}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are aligned to the left."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _where(environment: dict[str, str]) -> str:
    """What figures were measured on."""
    named = {"driver": "driver ", "torch": "PyTorch ", "triton": "Triton ", "commit": "commit "}
    parts = [f"{prefix}{environment[key][:12]}" for key, prefix in named.items() if environment.get(key)]
    return ", ".join([environment.get("gpu", "CPU"), *parts])


def _ssd(results: dict[str, Any], where: str) -> str:
    rows, worst = [], 0.0
    for name, result in results.items():
        row = [_SHAPES[name]]
        for which, peer in zip(("fwd", "bwd"), _PEER[name], strict=True):
            mine, kernels = result[f"{which}_ms"], result.get(f"{which}_graph_ms")
            shown = ["", ""] if kernels is None else [f"{kernels:.3f}", f" ({peer / kernels:.1f})"]
            row += [f"{mine:.3f}", shown[0], f"{peer:.2f}", f"{peer / mine:.1f}{shown[1]}"]
        rows.append(row)
        worst = max(worst, *result["relative_errors"].values())
    each = ["as a graph", "mamba_ssm", "times"]
    header = ["B, L, H, P, N", "forward", *each, "backward", *each]
    return f"""## SSD

Milliseconds, forward without gradients and backward of all inputs, bf16 with float32 A, D and bias, beside mamba_ssm
2.3.2's Triton kernels on the same kind of GPU (medians of Triton's `do_bench`; in brackets the kernels alone, as a CUDA
graph: where launches take longer than kernels, `do_bench` times the host's Python).

{_table(header, rows)}

Relative distance (Frobenius) to float32 of outputs and gradients: at most {worst:.1e}, the rounding of bf16.

{where}."""


def _decode(results: dict[str, Any], where: str) -> str:
    rows, states = [], []
    for layer in ("Mamba1", "Mamba2"):
        for batch in (1, 64):
            graphs, eager = (results[f"{layer}_batch{batch}_{kind}"] for kind in ("graphs", "eager"))
            row = [f"{graphs['tokens_per_s']:,.0f}", f"{graphs['ms_per_step']:.2f}", f"{eager['tokens_per_s']:,.0f}"]
            rows.append([layer, str(batch), *row])
        sizes = {int(length): size / 2**20 for length, size in results[f"{layer}_state_bytes"].items()}
        states.append(
            f"{layer}: " + ", ".join(f"{size:.2f} MiB at {length:,} tokens" for length, size in sizes.items())
        )
    header = ["Layer", "batch", "tokens/s, CUDA graphs", "ms a step", "tokens/s, eager"]
    return f"""## Decoding

130M parameters (24 layers, width 768), bf16, prompts of 128 tokens, greedy.

{_table(header, rows)}

State of one sequence, constant in its length: {"; ".join(states)}.

{where}."""


def _length(results: dict[str, Any], where: str) -> str:
    header, rows = ["Tokens"], []
    for name, result in results.items():
        header += [f"{name} ({result['parameters'] / 1e6:.0f}M), ms", "eager, ms", "MiB"]
    for tokens in next(iter(results.values()))["lengths"]:
        row = [f"{int(tokens):,}"]
        for result in results.values():
            measured = result["lengths"][tokens]
            row.append(f"{measured['graph_ms']:.1f}" if "graph_ms" in measured else "")
            row += [f"{measured['ms']:.1f}", f"{measured['peak_mib']:,.0f}"]
        rows.append(row)
    return f"""## Length

One forward pass, batch 1, bf16: Mamba, Mamba-2 and a Transformer of equal size (SDPA flash, rotary, gated MLP). The
first number is a CUDA graph's, the GPU's own time; up to 8,192 tokens the launches of eager PyTorch take longer.

![time and memory against length](language/length.png)

{_table(header, rows, left=0)}

{where}."""


def _accuracy(task: str, final: dict[str, float]) -> str:
    """Accuracies of the end: at the training length; for induction heads also at others."""
    if task != "induction_heads":
        return f"{100 * next(iter(final.values())):.1f} %"
    shown = [length for length in ("256", "4096", "65536", "262144", "1048576") if length in final]
    return ", ".join(f"{int(length):,}: {100 * final[length]:.1f} %" for length in shown)


def _step_sizes(run: dict[str, Any]) -> str:
    """The largest step size at initialisation; S4D's do not depend on the run."""
    return "" if run["layer"] == "S4D" else f"{run['ssm_cfg'].get('dt_max', 0.1):g}"


def _synthetic(folder: Path) -> str:
    rows, environments = [], set()
    for path in sorted(folder.glob("*.jsonl")):
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        run, end = entries[0]["run"], entries[-1]
        last = next(entry for entry in reversed(entries) if "step" in entry)
        options = run["options"] | {"N": run["ssm_cfg"].get("d_state", 16)}
        size = f"{options['length']:,}" + (f", {options['num_pairs']} pairs" if "num_pairs" in options else "")
        rows.append([
            run["task"].replace("_", " "), size, run["layer"], str(options["N"]), _step_sizes(run), str(run["seed"]),
            f"{run.get('label_smoothing', 0):g}", f"{run['lr']:g}", f"{run.get('eps', 1e-8):g}",
            f"{end['parameters']:,}", f"{last['step']:,}", f"{last['seconds']:.0f}",
            _accuracy(run["task"], end["length"]),
        ])  # fmt: skip
        environments.add(_where(end))
    header = ["Task", "length", "Layer", "N", "dt", "seed", "smoothing", "lr", "eps", "parameters", "steps", "s"]
    header.append("accuracy")
    return f"""## Synthetic tasks

Two layers of width 64, AdamW. Selective copying: 16 tokens among 1,024. Induction heads: trained at length 256 and
shorter, tested at longer ones. Associative recall (MQAR). Every run is in `language/synthetic`; several shared the GPU.
Accuracy falls where the curriculum takes the next length.

![accuracies](language/synthetic/synthetic.png)

{_table(header, rows, left=3)}

dt: the largest step size at initialisation. Right answers at length 256 ask little of the gate: with step sizes of
0.001 to 0.1 at the start a state outlives 256 tokens by itself, and what was learned may fail at greater lengths (69.5
and 100 % at 65,536, from two seeds). With step sizes of 0.1 to 1, the default of `train_synthetic.py`, nothing is
remembered unless the gate closes on ordinary tokens: five of five runs hold up to 4,096 times the training length, with
smoothed labels and without, and so does one with 1 to 10. A high rate, and an eps of Adam below the gradients, which
are soon far below the usual 1e-8, are the other two parts of the recipe. Associative recall needs the larger state.

{"; ".join(sorted(environments))}."""


_MULTIPLES = (1, 4, 16, 64, 256)
"""Of the training length: where the reduced runs are shown."""


def _reduced(content: dict[str, Any]) -> str:
    rows = [
        [
            str(run["length"]), f"{run['steps']:,}", f"{run['label_smoothing']:g}", str(run["seed"]),
            *(f"{100 * run['accuracy'][str(run['length'] * times)]:.1f} %" for times in _MULTIPLES),
        ]
        for run in content["runs"]
    ]  # fmt: skip
    header = ["length", "steps", "label smoothing", "seed", *(f"x {times}" for times in _MULTIPLES)]
    return f"""### Induction heads at a reduced size, on a CPU

The recipe of `train_synthetic.py induction_heads --paper`, reduced: width 32, batch 32, few steps, trained at a shorter
length (`--d-model 32 --batch 32 --steps ... --length ...`) and tested up to the same 256 times the length, on
{content["sequences"]}; at length 16 there are 8 symbols instead of 16.

{_table(header, rows, left=0)}

Without smoothing the logits grow until the softmax is 1 to the last digit, and the gradient exactly 0, whatever is
forgotten at greater lengths. With it the loss is least where the answer's logit stands out by one margin at every
distance, so any decay, and any trace of the tokens between, goes on costing something.

CPU, PyTorch {content["environment"]["torch"]}."""


def _upstream(summary: dict[str, Any]) -> str:
    outcomes = ("passed", "failed", "error", "xfailed", "skipped")
    rows = [
        [f"`{name}`", *(f"{counts.get(outcome, 0):,}" for outcome in outcomes)]
        for name, counts in summary["tests"].items()
    ]
    rows.append(["all", *(f"{summary['totals'].get(outcome, 0):,}" for outcome in outcomes)])
    return f"""## Upstream's own tests

The tests in the source distributions of {" and ".join(summary["packages"])}, their imports pointed at this package
(`tools/upstream_tests.py`). Skipped are combinations that the tests themselves skip (a state with tokens that are not
channels-last), and those of functions that are private to mamba_ssm's kernels (`kernel` in the name), which have no
counterpart here. Expected failures are the tests that want results to differ between runs: they do not. mamba_ssm's
tests of single operators (selective scan, SSD, state update, gated norm) are in no source distribution of 1.2.0, 2.2.4,
2.3.1 and 2.3.2; in their place are the official code's recorded results in `tests/data/ops`, outputs and gradients.

{_table(["test", *outcomes], rows)}

{_where(summary["environment"])}. {summary.get("note", "")}"""


def main(folder: Annotated[Path, typer.Option(help="The figures.")] = Path("benchmarks/language")) -> None:
    """Write the page."""
    parts = ["# The 1-D line on one H200"]
    for name, write in {"ssd": _ssd, "decode": _decode, "length": _length}.items():
        path = folder / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            note = f" {content['note']}" if "note" in content else ""
            parts.append(write(content[name], _where(content["environment"])) + note)
    parts.append(_synthetic(folder / "synthetic"))
    if (folder / "reduced.json").exists():
        parts.append(_reduced(json.loads((folder / "reduced.json").read_text(encoding="utf-8"))))
    if (folder / "upstream.json").exists():
        parts.append(_upstream(json.loads((folder / "upstream.json").read_text(encoding="utf-8"))))
    parts.append("""```sh
python tools/bench_language.py ssd --output benchmarks/language      # decode, length
tools/gpu_language.sh results train
python tools/upstream_tests.py fetch
python tools/upstream_tests.py run -n 12 --summary benchmarks/language/upstream.json
python tools/language_report.py
```""")
    page = folder.with_suffix(".md")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    typer.echo(f"wrote {page}")


if __name__ == "__main__":
    typer.run(main)
