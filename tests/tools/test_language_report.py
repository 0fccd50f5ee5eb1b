"""The page of language figures says what the files beside it say."""

import importlib.util
import json
from pathlib import Path

_path = Path(__file__).resolve().parents[2] / "tools" / "language_report.py"
_spec = importlib.util.spec_from_file_location("language_report", _path)
language_report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(language_report)


def _write(folder, name, **content):
    (folder / name).write_text(json.dumps({"environment": {"gpu": "a GPU", "commit": "0123456789abcdef"}} | content))


def test_page(tmp_path):
    folder = tmp_path / "language"
    (folder / "synthetic").mkdir(parents=True)
    shape = {"fwd_ms": 0.45, "bwd_ms": 4.07, "fwd_graph_ms": 0.3, "relative_errors": {"y": 2e-3, "x": 1e-3}}
    _write(folder, "ssd.json", ssd={"ssd_196": shape})
    measured = {"ms": 9.0, "graph_ms": 3.0, "peak_mib": 1234.0}
    _write(folder, "length.json", length={"Mamba": {"parameters": 129e6, "lengths": {"2048": measured}}})
    run = {
        "task": "induction_heads",
        "layer": "Mamba1",
        "options": {"length": 256},
        "ssm_cfg": {},
        "seed": 1,
        "lr": 0.01,
    }
    log = [
        {"run": run},
        {"step": 3000, "seconds": 41.6},
        {"length": {"256": 1.0, "65536": 0.9765}, "parameters": 67008},
    ]
    (folder / "synthetic" / "run.jsonl").write_text("\n".join(map(json.dumps, log)))
    counts = {"passed": 6480, "skipped": 3888}
    _write(folder, "upstream.json", packages=["a==1", "b==2"], totals=counts, tests={"test_a.py::test_b": counts})

    ends = {str(32 * times): 1.0 if times < 256 else 0.281 for times in (1, 4, 16, 64, 256)}
    reduced = {"length": 32, "steps": 2500, "label_smoothing": 0.1, "seed": 2, "accuracy": ends}
    _write(folder, "reduced.json", sequences="8 sequences each", runs=[reduced], environment={"torch": "2.15"})

    language_report.main(folder)
    page = (tmp_path / "language.md").read_text()
    assert "| 128, 196, 12, 64, 64 | 0.450 | 0.300 | 0.90 | 2.0 (3.0) | 4.070 |  | 4.07 | 1.0 |" in page
    assert "at most 2.0e-03" in page and "commit 0123456789ab." in page
    assert "| 2,048 | 3.0 | 9.0 | 1,234 |" in page
    assert "| 16 | 0.1 | 1 | 0 | 0.01 | 1e-08 |" in page
    assert "67,008 | 3,000 | 42 | 256: 100.0 %, 65,536: 97.7 % |" in page
    assert "| `test_a.py::test_b` | 6,480 | 0 | 0 | 0 | 3,888 |" in page
    assert "| 32 | 2,500 | 0.1 | 2 |" + 4 * " 100.0 % |" + " 28.1 % |" in page
    assert "Decoding" not in page
