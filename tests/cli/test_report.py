"""``visionmamba report``: a page that is whole, says what was measured, survives interruptions and failing models."""

import csv
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from visionmamba.analysis import bench as module

QUICK = ("--sizes", "32,64", "--warmup", "0", "--repeats", "2", "--device", "cpu")
MODELS = ("test_vmamba", "test_vim", "--sweep", "test_vmamba,test_vim")
VOID = {"meta", "br", "hr", "img", "link", "input"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), "")


class Page(html.parser.HTMLParser):
    """Reads a page, and complains where a tag is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.cells, self.links = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "li", "strong", "text"):
            self.cells.append(data)


@pytest.fixture
def report(run, tmp_path):
    result = run("report", *MODELS, "--out", tmp_path, *QUICK)
    assert result.status == 0, result.err
    return tmp_path


def test_page_is_whole_and_needs_nothing_else(report):
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    assert {"zoo", "growth", "environment"} <= set(page.ids)
    assert "failures" not in page.ids
    assert all(link.startswith("#") for link in page.links)  # nothing from a network or another file
    assert {"test_vmamba", "test_vim", "0.42", "0.19"} <= set(page.cells)
    text = (report / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") == text.count("</svg>") == 2  # test models have no accuracy to plot
    assert not re.search(r"url\((?!#)|@import|<script", text)


def test_markdown_says_the_same(report):
    text = (report / "report.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| test_v")]
    assert len(lines) == 2 + 2  # the table, and the growth
    assert {line.count("|") for line in lines[:2]} == {10}  # columns without a figure are left out
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (report / name).read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_figures_are_those_measured(report):
    with (report / "measurements" / "infer.csv").open(encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["model"] == "test_vmamba")
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    assert f"{float(row['infer_samples_per_sec']):.1f}" in page.cells
    assert json.loads((report / "measurements" / "environment.json").read_text())["torch"] in page.cells


def test_an_interrupted_report_is_resumed(run, tmp_path, monkeypatch):
    measure, measured = module.measure, []

    def interrupted(setting, *arguments):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(setting)
        return measure(setting, *arguments)

    monkeypatch.setattr(module, "measure", interrupted)
    result = run("report", *MODELS, "--out", tmp_path, *QUICK)
    assert result.status == 130
    assert f"interrupted: {tmp_path} keeps what was measured" in result.err
    assert not (tmp_path / "report.html").exists()
    first, measured[:] = list(measured), []
    monkeypatch.setattr(module, "measure", lambda setting, *rest: measured.append(setting) or measure(setting, *rest))
    assert run("report", *MODELS, "--out", tmp_path, *QUICK).status == 0
    assert not set(first) & set(measured)
    assert (tmp_path / "report.html").exists()


def test_a_failing_model_is_named_and_the_rest_are_there(run, tmp_path, monkeypatch):
    create = module.create_for_size

    def fail(name, *arguments):
        if name == "test_vim" and "meta" not in arguments:
            raise RuntimeError("no <room> for it")
        return create(name, *arguments)

    monkeypatch.setattr(module, "create_for_size", fail)
    result = run("report", *MODELS, "--out", tmp_path, *QUICK)
    assert result.status == 0
    assert "error: test_vim at 64: RuntimeError: no <room> for it" in result.err
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "failures" in page.ids
    assert any("no <room> for it" in cell for cell in page.cells)
    assert "## Failed" in (tmp_path / "report.md").read_text(encoding="utf-8")


def _fake(monkeypatch):
    """Measure nothing: a graph is three times as fast."""

    def measure(setting, *_):
        speed = 30.0 if setting.run == "graph" else 10.0
        fake = {"infer_samples_per_sec": f"{speed:.2f}", "infer_step_time": "100.0", "error": ""}
        return {**setting.identity(), **fake, "peak_memory_mib": "50.0" if setting.run == "eager" else "60.0"}

    monkeypatch.setattr(module, "measure", measure)


def test_published_and_own_accuracy_stand_side_by_side(run, tmp_path, monkeypatch):
    _fake(monkeypatch)
    table = tmp_path / "own.csv"
    table.write_text("model,top1\nvmamba_tiny_s1l8,82.45\n")
    arguments = ("vmamba_tiny_s1l8", "convnext_tiny", "--sweep", "vmamba_tiny_s1l8", "--no-training")
    result = run("report", *arguments, "--accuracy", table, "--out", tmp_path, *QUICK)
    assert result.status == 0, result.err
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| vmamba_tiny"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[-3:] == ["82.6", "82.45", "-0.15"]
    assert cells[4:7] == ["4.91", "4.905609984", "0"]
    assert (tmp_path / "accuracy.svg").exists()


def test_runs_stand_side_by_side(run, tmp_path, monkeypatch):
    _fake(monkeypatch)
    result = run("report", *MODELS, "--runs", "eager,graph", "--out", tmp_path, *QUICK)
    assert result.status == 0, result.err
    header, _, row, *_ = (line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|"))
    cells = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (header, row)), strict=True))
    assert (cells["Images/s"], cells["Images/s CUDA graph"], cells["Memory (MiB)"]) == ("10.0", "30.0", "50")
    assert "Images/s compiled" not in cells
    assert "in a CUDA graph" in (tmp_path / "report.md").read_text()


def test_what_was_measured_elsewhere_is_shown(run, report):
    environment = report / "measurements" / "environment.json"
    environment.write_text(json.dumps({"device": "abacus", "torch": "1.0"}))
    for name in ("report.html", "report.md"):
        (report / name).unlink()
    arguments = ("report", *MODELS, "--out", report, *QUICK)
    assert "holds results of another machine" in run(*arguments).err
    assert run(*arguments, "--no-measure").status == 0
    assert "# The zoo on abacus" in (report / "report.md").read_text()
    assert {"test_vmamba", "test_vim", "abacus"} <= set(Page((report / "report.html").read_text()).cells)
    empty = run("report", *MODELS, "--out", report / "empty", *QUICK, "--no-measure")
    assert (empty.status, "holds no measurements" in empty.err) == (1, True)


def test_every_family_has_a_look_of_its_own():
    from visionmamba.analysis.report import _LOOKS, _look, default_models

    assert {tuple(_look(name).values()) for name in default_models()} == set(_LOOKS.values())
    assert all(len(set(values)) == len(_LOOKS) for values in zip(*_LOOKS.values(), strict=True))


def test_default_models_are_the_224_pixel_models_and_three_peers():
    from visionmamba.analysis.report import default_models, sweep_models

    names = default_models()
    assert {"vmamba_tiny_s1l8", "vim_tiny_patch16_224", "plainmamba_l1", "local_vim_tiny"} <= set(names)
    assert names[-3:] == list(module.PEERS)
    assert not [name for name in names if "3d" in name or name.startswith("test_")]
    assert "deit_small_patch16_224" in sweep_models(["vim_tiny_patch16_224", "vim_base_patch16_224"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["test_vanba"], "unknown model 'test_vanba'"),
        (["test_vim", "--sizes", "32,x"], "--sizes: expected a size"),
        (["test_vim", "--precision", "fp8"], "--precision: expected one of fp32, tf32, bf16, fp16, got 'fp8'"),
        (["test_vim", "--accuracy", "missing.csv"], "--accuracy: "),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, arguments, message):
    result = run("report", *arguments, "--out", tmp_path / "out")
    assert result.status == 1
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.skipif(not BROWSER, reason="no browser (chromium, google-chrome) on this machine")
def test_page_in_a_real_browser(report):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    options += [f"--user-data-dir={report / 'browser'}"]  # another browser may be running
    page, picture = report / "report.html", report / "page.png"
    dom = subprocess.run([BROWSER, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True)
    assert dom.stdout.count("<tr") >= 10
    assert dom.stdout.count("<svg") == 2
    command = [BROWSER, *options, "--window-size=1400,2400", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True)
    from PIL import Image

    assert len(Image.open(picture).convert("RGB").getcolors(1 << 24)) > 20  # something was drawn
