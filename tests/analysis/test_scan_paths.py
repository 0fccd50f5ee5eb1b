import numpy as np
import pytest
import timm

from visionmamba.analysis.scan_paths import _places, draw_paths, layers_by_path, side_by_side, write_figure
from visionmamba.ops.scan_path import scan_path


def test_layers_of_a_model_whose_order_alternates():
    layers = layers_by_path(timm.create_model("mamba2d_small_patch16_224", device="meta"))
    assert list(layers) == ["h", "h_flip", "v", "v_flip"]
    assert layers["v"] == [f"blocks.{i}" for i in range(2, 24, 4)]


def test_layers_of_a_model_with_one_path():
    layers = layers_by_path(timm.create_model("plainmamba_l1", device="meta"))
    assert layers == {"snake_h,snake_h_flip,snake_v,snake_v_flip": [f"blocks.{i}" for i in range(24)]}


@pytest.mark.parametrize("family", ["vim", "vmamba", "plainmamba", "efficient_vmamba", "local_vmamba", "mamba_nd"])
def test_every_model_shows_its_paths(family):
    for name in timm.list_models(module=family):
        layers = layers_by_path(timm.create_model(name, device="meta"))
        assert layers and all(layers.values()), name


def test_frames_lie_side_by_side():
    path = scan_path("wht", (2, 3, 4))
    places = _places(path, 0)
    assert places[:3].tolist() == [[0, 0], [5, 0], [0, 1]]  # the next frame is 4 columns and a gap away
    assert len(np.unique(places, axis=0)) == 24


def test_panels():
    paths = {"first": "h,h_flip", "second": "w3", "with class token": "v|cls"}
    figure = draw_paths(paths, (4, 5))
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == ["h", "h_flip", "w3", "v"]
    numbers = [text.get_text() for text in shown[1].texts]
    assert numbers == [str(step) for step in range(1, 21)]
    x, y = shown[1].texts[0].get_position()
    assert (round(x), round(y)) == (4, 3)  # in the cell of the first step
    assert "class token" in shown[3].get_ylabel()


def test_columns_of_distinct_directions():
    figure = side_by_side({"a": ["h,v", "v,h_flip"], "b": ["h"]}, (3, 3), limit=2)
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == ["a\nh", "b\nh", "v"]
    assert shown[2].get_xlabel() == "and 1 more"


@pytest.mark.parametrize("grid", [(1, 1), (7,), (2, 3, 4), (40, 3)])
def test_any_grid(grid, tmp_path):
    write_figure(draw_paths({"": "h"}, grid), tmp_path / "path.png")
    assert (tmp_path / "path.png").stat().st_size > 1000


def test_a_failed_write_leaves_the_old_picture(tmp_path):
    old = tmp_path / "picture.nonsense"
    old.write_text("old")
    with pytest.raises(ValueError, match="nonsense"):
        write_figure(draw_paths({"": "h"}, (2, 2)), old)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]
