"""scikit-learn's bundled handwritten digits: real 8 x 8 scans, as images of any size or as clips of moving digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["DIGIT_NAMES", "Digits", "load_digits", "render_digits"]

DIGIT_NAMES = tuple(str(digit) for digit in range(10))
_CLIP_SCALE = 0.75  # share of a frame's height and width that a moving digit takes


class Digits(NamedTuple):
    """A set of digits.

    Args:
        images: ``(N, 8, 8)`` float32 in [0, 1], ink is 1.
        labels: ``(N,)`` int64.
        motion: ``(N, 2, 2)`` float32 in [-1, 1]: where in a clip's frame each digit starts and ends, as (x, y) shares
            of the room that it has to move.
    """

    images: torch.Tensor
    labels: torch.Tensor
    motion: torch.Tensor

    def select(self, index: torch.Tensor | slice) -> Digits:
        """Return the digits at some indices."""
        return Digits(*(field[index] for field in self))

    def to(self, device: torch.device) -> Digits:
        """Return the digits on a device."""
        return Digits(*(field.to(device) for field in self))


def load_digits(seed: int = 0) -> tuple[Digits, Digits]:
    """Load the 1797 digits and hold a third of them out, the same share of every class.

    Args:
        seed: Seeds the split and the motion of the digits in clips.

    Returns:
        The digits to train on and the held-out third.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), in ``sklearn.datasets``.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    data = datasets.load_digits()
    generator = torch.Generator().manual_seed(seed)
    digits = Digits(
        images=torch.as_tensor(data.images, dtype=torch.float32) / 16,
        labels=torch.as_tensor(data.target, dtype=torch.int64),
        motion=torch.rand(len(data.target), 2, 2, generator=generator) * 2 - 1,
    )
    indices = torch.arange(len(digits.labels))
    train, held_out = train_test_split(
        indices.numpy(), test_size=1 / 3, random_state=seed, stratify=digits.labels.numpy()
    )
    return digits.select(torch.as_tensor(train)), digits.select(torch.as_tensor(held_out))


def render_digits(digits: Digits, size: tuple[int, ...]) -> torch.Tensor:
    """Draw digits at the size that a model takes.

    Args:
        digits: What to draw.
        size: ``(C, H, W)`` for images that the digit fills, or ``(C, T, H, W)`` for clips in which it moves.

    Returns:
        ``(N, *size)`` float32 from -1 (ink) to 1 (paper), as a scan of a page is, on the digits' device; the channels
        are equal.
    """
    channels, *frames, height, width = size
    n_frames = frames[0] if frames else 1
    scale = _CLIP_SCALE if frames else 1.0
    start, end = digits.motion.unbind(1)
    steps = torch.linspace(0, 1, n_frames, device=start.device)[:, None]
    room = 1 - scale
    shift = (start[:, None] + (end - start)[:, None] * steps).flatten(0, 1) * room / scale
    theta = torch.zeros(len(shift), 2, 3, device=shift.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -shift
    pictures = digits.images[:, None].repeat_interleave(n_frames, dim=0)
    grid = F.affine_grid(theta, [len(shift), 1, height, width], align_corners=False)
    drawn = F.grid_sample(pictures, grid, mode="bilinear", align_corners=False)
    drawn = drawn.unflatten(0, (-1, n_frames)).transpose(1, 2)
    if not frames:
        drawn = drawn.squeeze(2)
    return (1 - 2 * drawn).repeat_interleave(channels, dim=1)
