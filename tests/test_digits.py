"""The digits: how they are split, and how they are drawn."""

import numpy as np
import torch

from visionmamba.data import load_digits, render_digits


def test_digits_are_split_by_class():
    train, held_out = load_digits()
    assert (len(train.labels), len(held_out.labels)) == (1198, 599)
    shares = [np.bincount(part.labels) / len(part.labels) for part in (train, held_out)]
    np.testing.assert_allclose(*shares, atol=0.002)
    again = load_digits()
    assert all(torch.equal(a, b) for a, b in zip(train, again[0], strict=True))


def test_rendering():
    digits = load_digits()[0].select(slice(5))
    exact = render_digits(digits, (3, 8, 8))
    torch.testing.assert_close(exact, (1 - 2 * digits.images)[:, None].expand(-1, 3, -1, -1))
    clips = render_digits(digits, (1, 6, 32, 32))
    assert clips.shape == (5, 1, 6, 32, 32)
    ink = (1 - clips[:, 0]).sum((-1, -2))
    torch.testing.assert_close(ink, ink[:, :1].expand_as(ink), rtol=0.06, atol=0)  # all of it stays in the frame
    columns = torch.arange(32.0)
    centres = ((1 - clips[:, 0]).sum(-2) * columns).sum(-1) / ink
    travelled = (digits.motion[:, 1, 0] - digits.motion[:, 0, 0]) * 32 / 2 * (1 - 0.75)
    torch.testing.assert_close(centres[:, -1] - centres[:, 0], travelled, atol=0.3, rtol=0)
