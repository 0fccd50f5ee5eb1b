import pytest
import torch
import torch.nn.functional as F

from visionmamba.layers import resize_pos_embed_aligned, resize_pos_embed_official


def smooth(rows, columns):
    """An embedding that is linear in the position, without extreme borders: resizing keeps its order."""
    y = torch.linspace(0, 1, rows)[:, None].expand(rows, columns)
    x = torch.linspace(0, 1, columns)[None].expand(rows, columns)
    return torch.stack([y, x], dim=-1).reshape(1, rows * columns, 2)


@pytest.mark.parametrize(("position", "index"), [("", None), ("head", 0), ("middle", 18)])
def test_aligned_keeps_the_class_row_and_the_order(position, index):
    embed = smooth(6, 6)
    if index is not None:
        embed = torch.cat([embed[:, :index], torch.full((1, 1, 2), 9.0), embed[:, index:]], dim=1)
    resized = resize_pos_embed_aligned(embed, (4, 9), position)
    assert resized.shape == (1, 36 + (index is not None), 2)
    if index is not None:  # 36 patches again: the class token stays where it was
        assert (resized[0, index] == 9).all()
        resized = torch.cat([resized[:, :index], resized[:, index + 1 :]], dim=1)
    grid = resized.unflatten(1, (4, 9))
    assert (grid[0, 1:, :, 0] > grid[0, :-1, :, 0]).all() and (grid[0, :, 1:, 1] > grid[0, :, :-1, 1]).all()
    assert resized.max() < 2  # the class row did not leak into the patches


def test_aligned_double():
    embed = torch.cat([torch.full((1, 1, 2), 5.0), smooth(3, 5), torch.full((1, 1, 2), 7.0)], dim=1)
    resized = resize_pos_embed_aligned(embed, (6, 4), "double", old_grid=(3, 5))
    assert resized.shape == (1, 26, 2)
    assert (resized[0, 0] == 5).all() and (resized[0, -1] == 7).all()


def test_official_takes_the_first_rows_for_the_class_tokens():
    embed = torch.randn(1, 17, 3)
    resized = resize_pos_embed_official(embed, (7, 7), num_class_tokens=1)
    patches = F.interpolate(embed[:, 1:].reshape(1, 4, 4, 3).permute(0, 3, 1, 2), (7, 7), mode="bicubic")
    torch.testing.assert_close(resized[:, :1], embed[:, :1])
    torch.testing.assert_close(resized[:, 1:], patches.permute(0, 2, 3, 1).reshape(1, 49, 3))


def test_official_mistakes_a_middle_class_token_for_a_patch():
    embed = torch.cat([smooth(4, 4)[:, :8], torch.full((1, 1, 2), 9.0), smooth(4, 4)[:, 8:]], dim=1)
    official = resize_pos_embed_official(embed, (8, 8), num_class_tokens=1)
    aligned = resize_pos_embed_aligned(embed, (8, 8), "middle")
    assert (official[:, 1:] > 2).any()  # leaked into patches
    assert (aligned[0, 32] == 9).all() and (aligned > 2).sum() == 2


def test_the_same_grid_changes_nothing():
    embed = torch.randn(1, 26, 3)
    torch.testing.assert_close(resize_pos_embed_aligned(embed, (5, 5), "middle"), embed)
    torch.testing.assert_close(resize_pos_embed_official(embed, (5, 5), 1), embed, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "resize", [lambda e: resize_pos_embed_official(e, (4, 4), 1), lambda e: resize_pos_embed_aligned(e, (4, 4), "head")]
)
def test_rows_of_no_square_are_named(resize):
    with pytest.raises(ValueError, match="pos_embed: expected rows for a square grid of patches, got 12"):
        resize(torch.zeros(1, 13, 3))
