"""Write the table of every model's operations and parameters beside the published figures.

python tools/flops.py [--check]

It writes benchmarks/flops.md and benchmarks/flops.csv; with --check it writes nothing and fails if they are out of
date. For one model use `visionmamba flops`.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

import timm

from visionmamba.analysis.cost import model_cost
from visionmamba.analysis.published import PUBLISHED, RULES, agrees
from visionmamba.zoo import model_names

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
INTRODUCTION = """\
# Operations and parameters of every model, beside the published figures

Written by `python tools/flops.py`; `visionmamba flops MODEL` counts one model at any size. Nothing here is measured.

One input of the model's own size. **Ours** is by the convention of the field's tables: in units of 1e9, 1 for a
multiply-accumulate of convolutions, linear layers and matrix products, 5 an element for layer norms and 2 for batch
norms, and for each scan `9BLDN + BLD` (B images, L steps, D channels of all directions, N states). **Recurrence**
counts the scan as it is written instead: `(7N + 3)BLD`; with N = 1 both are the same. **By their rule** is our model
counted as the authors counted theirs, where that is another rule; every published figure is met by its own rule.
**Differs** is ours less the published figure, relative to it. Activations are the elements, in millions, that
convolutions, matrix products and scans put out.
"""
COLUMNS = {
    "model": "Model",
    "input_size": "Input",
    "params": "Params (M)",
    "params_published": "published",
    "gflops": "Ours (G)",
    "gflops_published": "Published",
    "difference": "Differs",
    "gflops_their_rule": "By their rule",
    "gflops_recurrence": "Recurrence",
    "scan_share": "Scan's share",
    "activations": "Activations (M)",
    "note": "Why",
}


def row(name: str) -> dict[str, Any] | None:
    """Return a model's figures; None if it cannot be built without a package that is not installed."""
    try:
        model = timm.create_model(name, device="meta")
    except ImportError:
        return None
    published, cost = PUBLISHED[name], model_cost(model, name=name, memory=False)
    ours, theirs = cost.flops / 1e9, published.gflops
    by_rule = None if theirs is None else RULES[published.rule](model) / 1e9
    if by_rule is not None and not agrees(by_rule, theirs):
        raise SystemExit(f"{name}: {by_rule} G by the rule {published.rule!r}, published {theirs} G")
    same = theirs is None or agrees(ours, theirs)
    params_differ = published.params is not None and not agrees(cost.params / 1e6, published.params, cut=True)
    return {
        "model": name,
        "input_size": "x".join(map(str, cost.input_size[1:])),
        "params": f"{cost.params / 1e6:.6f}",
        "params_published": published.params or "",
        "gflops": f"{ours:.9f}",
        "gflops_published": theirs or "",
        "difference": "" if theirs is None else "0" if same else f"{ours / float(theirs) - 1:+.1%}",
        "gflops_their_rule": "" if same or by_rule is None else f"{by_rule:.9f}",
        "gflops_recurrence": f"{cost.flops_recurrence / 1e9:.9f}",
        "scan_share": f"{cost.scan / cost.flops:.1%}",
        "activations": f"{cost.activations / 1e6:.3f}",
        "note": "" if same and theirs and not params_differ else published.note,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown, figures to three digits after the point unless they were published to more."""
    lines = [INTRODUCTION, "| " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|" + "|".join("---" if key in ("model", "input_size", "note") else "--:" for key in COLUMNS) + "|")
    for figures in rows:
        shown = dict(figures, model=f"`{figures['model']}`")
        exact = figures["difference"] == "0" and len(figures["gflops_published"]) > 8
        for key in ("params", "gflops_their_rule", "gflops_recurrence", *(() if exact else ("gflops",))):
            shown[key] = f"{float(shown[key]):.3f}" if shown[key] else ""
        lines.append("| " + " | ".join(shown[key] for key in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> int:
    """Write the files, or with ``--check`` return 1 if they are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the files are out of date")
    check = parser.parse_args().check
    rows = [row(name) for name in model_names()]
    if None in rows:
        missing = [name for name, figures in zip(model_names(), rows, strict=True) if figures is None]
        print(f"error: cannot build {', '.join(missing)}; pip install 'visionmamba[medical]'", file=sys.stderr)
        return 1
    for path, text in ((FOLDER / "flops.md", markdown(rows)), (FOLDER / "flops.csv", table(rows))):
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            print(f"{path.name} is out of date; run python tools/flops.py", file=sys.stderr)
            return 1
        if not check:
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
