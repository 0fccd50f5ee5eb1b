"""Clips for models of videos: which frames, and how they are read from videos and animated images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageSequence
from timm.data.readers.img_extensions import add_img_extensions, get_img_extensions, set_img_extensions

__all__ = ["VIDEO_EXTENSIONS", "clip_positions", "read_animation", "read_video", "videos_count_as_images"]

VIDEO_EXTENSIONS = (".avi", ".mkv", ".mov", ".mp4", ".webm", ".gif")
"""Files that a folder of clips may hold beside pictures."""


def clip_positions(length: int, frames: int, stride: int | None, training: bool) -> list[int]:
    """Return which frames of a video make a clip.

    Args:
        length: Frames of the video.
        frames: Frames of the clip.
        stride: Distance of two frames of the clip; None spreads them evenly over the video.
        training: Begin anywhere, drawn from PyTorch's generator; else the clip is the middle one.

    Returns:
        The frames' numbers; the last one again and again where the video is too short.
    """
    if stride is None:
        return torch.linspace(0, length - 1, frames).round().long().tolist()
    room = max(length - (frames - 1) * stride, 1)
    start = int(torch.randint(room, ())) if training else room // 2
    return [min(start + frame * stride, length - 1) for frame in range(frames)]


def read_animation(image: Image.Image, mode: str) -> list[Image.Image]:
    """Return all pictures of an animated image.

    Args:
        image: The opened image.
        mode: Pillow's mode of the pictures.
    """
    return [shot.convert(mode) for shot in ImageSequence.Iterator(image)]


def read_video(file: BinaryIO, mode: str, frames: int, stride: int | None, training: bool) -> list[Image.Image]:
    """Return the pictures of a clip of a video, decoding no more than it needs.

    Args:
        file: The opened file.
        mode: Pillow's mode of the pictures.
        frames: Frames of the clip.
        stride: See :func:`clip_positions`.
        training: See :func:`clip_positions`.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: It is not a video, or a broken one.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'visionmamba[training]'") from error
    try:
        with av.open(file) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            length = stream.frames
            if not length:  # the container does not say
                length = sum(1 for _ in container.decode(stream))
                container.seek(0)
            positions = clip_positions(length, frames, stride, training)
            shots = _pictures(container.decode(stream), positions, mode)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"not a readable video: {error}") from error
    if not shots:
        raise ValueError("a video without frames")
    return [shots[min(position, max(shots))] for position in positions]


def _pictures(decoded: Iterator[Any], positions: list[int], mode: str) -> dict[int, Image.Image]:
    """Return the pictures of some frames by number; the last one's too where a video ends before it should."""
    shots, number, frame = {}, -1, None
    for number, frame in enumerate(decoded):
        if number in positions:
            shots[number] = frame.to_image().convert(mode)
        if number >= positions[-1]:
            break
    if frame is not None and number not in shots:
        shots[number] = frame.to_image().convert(mode)
    return shots


@contextlib.contextmanager
def videos_count_as_images() -> Iterator[None]:
    """Let timm's readers of folders find videos and animations too."""
    before = get_img_extensions()
    add_img_extensions(VIDEO_EXTENSIONS)
    try:
        yield
    finally:
        set_img_extensions(before)
