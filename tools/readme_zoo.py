"""Write the README's table of the zoo from the registry, or check that it is up to date.

python tools/readme_zoo.py [--check]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from itertools import groupby
from pathlib import Path

from visionmamba.zoo import ModelSummary, model_names, summarize

README = Path(__file__).resolve().parents[1] / "README.md"
START = "<!-- zoo: written by tools/readme_zoo.py -->\n"
END = "<!-- zoo: end -->"
HEADER = ("| Model | Params (M) | Top-1 (%) | Weights |", "|---|--:|--:|---|")


def _row(summary: ModelSummary) -> str:
    """Return a model's row; the one in the README if the model cannot be built without a package that is missing."""
    if summary.params is None:
        rows = README.read_text(encoding="utf-8").splitlines()
        return next((row for row in rows if row.startswith(f"| `{summary.name}` |")), f"| `{summary.name}` | | | |")
    top1 = "" if summary.top1 is None else f"{summary.top1:.1f}"
    weights = f"[authors']({summary.weights})" if summary.weights else ""
    return f"| `{summary.name}` | {summary.params / 1e6:.2f} | {top1} | {weights} |"


def zoo_table() -> str:
    """Return the README's section of models in Markdown, a table for each family."""
    summaries = sorted(map(summarize, model_names()), key=lambda summary: summary.family)
    parts = []
    for family, members in groupby(summaries, key=lambda summary: summary.family):
        title = importlib.import_module(f"visionmamba.models.{family}").__doc__.strip().splitlines()[0]
        rows = [_row(summary) for summary in members]
        parts.append("\n".join([f"**{title}**\n", *HEADER, *rows]))
    return "\n" + "\n\n".join(parts) + "\n\n"


def main() -> int:
    """Rewrite the README's section, or with ``--check`` return 1 if it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(START)
    tail = rest[rest.index(END) :]
    wanted = head + START + zoo_table() + tail
    if wanted == text:
        return 0
    if arguments.check:
        print("README.md: the table of the zoo is out of date; run python tools/readme_zoo.py", file=sys.stderr)
        return 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
