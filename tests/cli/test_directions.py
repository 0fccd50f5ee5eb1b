import json

import pytest
import timm
import torch

from visionmamba.layers import LOCAL_DIRECTIONS
from visionmamba.models import local_vim

SUPERNET = "local_vim_tiny_search"


@pytest.fixture(scope="module")
def supernet():
    """A supernet whose layer i prefers the directions from the i-th on."""
    model = timm.create_model(SUPERNET)
    for i, block in enumerate(model.blocks):
        block.mixer.ssm.merge.weights.data = torch.linspace(1, 0, 8).roll(i)
    return model


def test_authors_and_own_layout(run, tmp_path, supernet):
    expected = [
        ",".join(name for k, name in enumerate(LOCAL_DIRECTIONS) if (k - i) % 8 < 4)
        for i in range(len(supernet.blocks))
    ]
    own = supernet.state_dict()
    for nested in (own, {"model": local_vim.official_state_dict(own, supernet)}):
        torch.save(nested, tmp_path / "supernet.pth")
        finished = run("directions", tmp_path / "supernet.pth", "--model", SUPERNET, "--json")
        assert finished.status == 0
        result = json.loads(finished.out)
        assert result["directions"] == expected
        assert [layer["layer"] for layer in result["layers"]] == [f"blocks.{i}" for i in range(20)]
        assert sum(result["layers"][3]["weights"].values()) == pytest.approx(1)
    searched = timm.create_model("local_vim_tiny", directions=result["directions"], device="meta")
    assert searched.blocks[1].mixer.ssm.directions.path == "h_flip,v,v_flip,w2"


def test_the_printed_list_is_python(run, tmp_path, supernet):
    torch.save(supernet.state_dict(), tmp_path / "supernet.pth")
    finished = run("directions", tmp_path / "supernet.pth", "--model", SUPERNET, "--number", 2)
    assert "blocks.1: h_flip 19.5%, v 16.9%" in finished.out
    chosen = eval(finished.out.partition("directions=")[2])
    assert chosen[:2] == ("h,h_flip", "h_flip,v")
    assert len(chosen) == 20


def test_bad_input_is_one_line(run, tmp_path, checkpoint, supernet):
    state_dict = supernet.state_dict()
    state_dict["blocks.2.mixer.ssm.merge.weights"] = torch.full((8,), torch.inf)
    torch.save(state_dict, tmp_path / "infinite.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 cut off")
    for arguments, message in (
        ((checkpoint, "--model", SUPERNET), "not of a supernet, it holds no weights of scan directions"),
        ((checkpoint, "--model", "local_vim_tiny"), "--model: expected the supernet of a direction search"),
        ((checkpoint, "--model", "local_vim_tiny_serch"), "did you mean local_vim_tiny_search"),
        ((tmp_path / "missing.pth", "--model", SUPERNET), "no such file"),
        ((tmp_path / "broken.pth", "--model", SUPERNET), "not a readable checkpoint"),
        ((tmp_path / "infinite.pth", "--model", "local_vssm_tiny_search"), "does not fit"),
        ((tmp_path / "infinite.pth", "--model", SUPERNET), "finite weights of directions"),
    ):
        finished = run("directions", *arguments)
        assert finished.status == 1
        assert message in finished.err
        assert finished.err.count("\n") == 1
        assert not finished.out
