import pytest
from PIL import Image


def test_a_model(run, tmp_path):
    finished = run("paths", "test_mamba2d", "--grid", "4x6", "--out", tmp_path / "new" / "paths.png")
    assert finished.status == 0
    assert "test_mamba2d: v_flip in blocks.3" in finished.out
    assert Image.open(tmp_path / "new" / "paths.png").size[0] > 200


@pytest.mark.parametrize("order", ["h,v_flip", "w3", "sub_201", "snake_v", "wht", "v|cls"])
def test_an_order(run, tmp_path, order):
    assert run("paths", order, "--out", tmp_path / "order.png").status == 0
    assert Image.open(tmp_path / "order.png").width > 100


def test_several_side_by_side(run, tmp_path):
    finished = run("paths", "test_vmamba", "test_plainmamba", "w2", "--limit", 2, "--out", tmp_path / "all.svg")
    assert finished.status == 0
    assert "<svg" in (tmp_path / "all.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_mamba2"], "did you mean"),
        (["diagonal"], "unknown direction 'diagonal'"),
        (["h", "--grid", "3xq"], "--grid: expected HxW or TxHxW"),
        (["h", "--grid", "0x3"], "--grid: expected HxW or TxHxW"),
        (["thw", "--grid", "4x4"], "expects 3 axes"),
        (["test_plainmamba", "--grid", "2x4x4"], "expects (rows, columns)"),
        (["h", "--out", "picture.nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    finished = run("paths", *arguments, *([] if "--out" in arguments else ["--out", "picture.png"]))
    assert finished.status == 1
    assert message in finished.err
    assert finished.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
