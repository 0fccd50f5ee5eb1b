import pytest
import torch

from visionmamba.layers import class_token_indices, insert_class_token, remove_class_token, take_class_token


@pytest.mark.parametrize("num_patches", [1, 6, 7])
@pytest.mark.parametrize(
    ("position", "indices"), [("head", lambda n: [0]), ("middle", lambda n: [n // 2]), ("double", lambda n: [0, n + 1])]
)
def test_insert_remove_take(position, indices, num_patches):
    x = torch.randn(2, num_patches, 3)
    where = indices(num_patches)
    token = torch.randn(1, len(where), 3)
    sequence = insert_class_token(x, token, position)
    assert class_token_indices(position, num_patches) == where
    torch.testing.assert_close(sequence[:, where], token.expand(2, -1, -1))
    torch.testing.assert_close(remove_class_token(sequence, position), x)
    torch.testing.assert_close(take_class_token(sequence, position), token.mean(1).expand(2, -1))


def test_published_positions():
    assert [class_token_indices("middle", patches) for patches in (196, 729, 160)] == [[98], [364], [80]]


def test_without_class_token():
    x = torch.randn(2, 5, 3)
    assert class_token_indices("", 5) == []
    assert remove_class_token(x, "") is x
