"""Images and clips for training and evaluation: timm's datasets and transforms, in an order any step can begin from.

An image's augmentation is drawn from (seed, epoch, place in the epoch), so it is the same whichever process or worker
reads it, and whether or not the run was interrupted before.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .._text import one_line
from .clips import VIDEO_EXTENSIONS, clip_positions, read_animation, read_video, videos_count_as_images
from .config import ConfigError, TrainConfig
from .distributed import World

__all__ = ["DataError", "Source", "open_source", "seed_everything"]

_PADDING = -1  # label of an image that only fills up a batch
_FILLING = 1 << 40  # its place
_MAX_UNREADABLE = 50
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DataError(RuntimeError):
    """Images or labels that cannot be used; one sentence."""


def _leave_with_the_trainer(_worker: int) -> None:
    """Let a loader's worker end when the process that reads from it is gone, killed or not, and not before.

    PyTorch's own watch looks at the worker's parent, which is the fork server where one starts the workers (the default
    on Linux from Python 3.14 on): it stays as long as they do, and they would stay for ever. Ctrl-C in a terminal goes
    to the workers too, and the trainer needs them until it stops.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()

    def watch() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def seed_everything(*place: int) -> None:
    """Seed Python, NumPy and PyTorch for a place in the run, given by non-negative numbers."""
    state = np.random.SeedSequence(place).generate_state(3)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]))


class _Reader:
    """Turns an image, a video or an animated image into a model's input.

    Args:
        transform: PIL image to tensor.
        mode: Pillow's mode for the model's channels.
        frames: Frames of a clip; None for a picture.
        stride: Distance of a clip's frames, see :func:`.clips.clip_positions`.
        training: Whether a clip begins anywhere.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], torch.Tensor],
        mode: str,
        frames: int | None,
        stride: int | None,
        training: bool,
    ) -> None:
        self.transform, self.mode = transform, mode
        self.frames, self.stride, self.training = frames, stride, training

    def open(self, file: BinaryIO, name: str, place: tuple[int, ...]) -> list[Image.Image]:
        """Return the pictures of a file at a place in the run."""
        if self.frames is not None and name.lower().endswith(VIDEO_EXTENSIONS):
            seed_everything(*place)
            return read_video(file, self.mode, self.frames, self.stride, self.training)
        with Image.open(file) as image:
            return self.decode(image, place)

    def decode(self, image: Image.Image, place: tuple[int, ...]) -> list[Image.Image]:
        """Return a picture, or those of an animated image's clip."""
        if self.frames is None:
            return [image.convert(self.mode)]
        seed_everything(*place)
        shots = read_animation(image, self.mode)
        return [shots[i] for i in clip_positions(len(shots), self.frames, self.stride, self.training)]

    def __call__(self, shots: list[Image.Image], place: tuple[int, ...]) -> torch.Tensor:
        """Return ``(C, H, W)`` or ``(C, T, H, W)``, augmented as the place in the run says; all frames alike."""
        clip = []
        for shot in shots:
            seed_everything(*place)
            clip.append(self.transform(shot))
        return clip[0] if self.frames is None else torch.stack(clip, dim=1)


class _MapSource(Dataset):
    """A dataset that is asked for (place in the epoch, image) instead of an image alone."""

    def __init__(self, dataset: Any, read: _Reader, seed: int, epoch: int, unreadable: str) -> None:
        self.dataset, self.read = dataset, read
        self.seed, self.epoch, self.unreadable = seed, epoch, unreadable

    def _open(self, index: int, place: tuple[int, ...]) -> tuple[list[Image.Image], int]:
        reader = getattr(self.dataset, "reader", None)
        if reader is None:  # torchvision's
            image, target = self.dataset[index]
            return self.read.decode(image, place), target
        file, target, *_ = reader[index]
        with file:
            return self.read.open(file, _filename(self.dataset, index), place), target

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int]:
        place, index = item
        for _ in range(_MAX_UNREADABLE):
            try:
                shots, target = self._open(index, (self.seed, self.epoch, place))
                tensor = self.read(shots, (self.seed, self.epoch, place))
                return tensor, _PADDING if place == _FILLING else int(target)
            except _UNREADABLE as error:
                name = _filename(self.dataset, index)
                if self.unreadable == "error":
                    problem = f"{name} cannot be read as an image ({one_line(error)})"
                    raise DataError(f"{problem}; unreadable=skip goes on") from None
                warnings.warn(f"skipped {name}, which cannot be read as an image", stacklevel=1)
                index = (index + 1) % len(self.dataset)
        raise DataError(f"{_MAX_UNREADABLE} images in a row cannot be read, the last one {name}")


def _filename(dataset: Any, index: int) -> str:
    try:
        return dataset.filename(index, absolute=True)
    except Exception:
        return f"image {index}"


class _StreamSource(IterableDataset):
    """A streamed dataset whose augmentation is seeded by worker and place."""

    def __init__(self, dataset: Any, read: _Reader, seed: int, epoch: int) -> None:
        self.dataset, self.read, self.seed, self.epoch = dataset, read, seed, epoch
        dataset.transform = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = torch.utils.data.get_worker_info()
        number = 0 if worker is None else worker.id
        for count, (image, target) in enumerate(self.dataset):
            place = (self.seed, self.epoch, number, count)
            yield self.read(self.read.decode(image, place), place), int(target)


@dataclass(frozen=True)
class Source:
    """Images of one split, and how they are read.

    Args:
        config: The recipe.
        world: The processes.
        split: The split's name.
        training: Shuffle and augment.
        batch_size: Images a batch, over all processes.
        make: Makes the dataset for an epoch.
        read: Turns an image into a model's input.
        length: Number of images.
        classes: Index of each class by name, where the dataset says.
        streamed: Whether it cannot be asked for the image of an index.
    """

    config: TrainConfig
    world: World
    split: str
    training: bool
    batch_size: int
    make: Callable[[int], Any]
    read: _Reader
    length: int
    classes: dict[str, int]
    streamed: bool

    @property
    def batches(self) -> int:
        """Batches an epoch; the last one is left out of training if it is not whole."""
        return self.length // self.batch_size if self.training else -(-self.length // self.batch_size)

    def order(self, epoch: int) -> torch.Tensor:
        """Return the images of an epoch in the order of its places, int64."""
        if not self.training:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.config.seed, epoch)).generate_state(1)[0])
        )
        order = torch.randperm(self.length, generator=generator)
        return order.repeat_interleave(self.config.repeats)[: self.length]

    def _places(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        """Yield this process's (place, image) pairs of each batch; views of an image go to different processes."""
        order, share = self.order(epoch).tolist(), self.batch_size // self.world.size
        for batch in range(start, self.batches):
            places = range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.length))[self.world.rank :]
            pairs = [(place, order[place]) for place in places[:: self.world.size]]
            yield pairs + [(_FILLING, order[0])] * (share - len(pairs))  # every process takes part in every batch

    def loader(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this process's part of an epoch's batches.

        Args:
            epoch: The epoch; it decides the order and the augmentation.
            start: Batch to begin with.

        Yields:
            Inputs and labels; the label is -1 for images that only fill up a batch.

        Raises:
            DataError: An image cannot be read.
        """
        config, share = self.config, self.batch_size // self.world.size
        generator = torch.Generator().manual_seed(config.seed + epoch)
        common = dict(
            num_workers=config.workers, generator=generator, pin_memory=self.world.device.type == "cuda",
            worker_init_fn=_leave_with_the_trainer,
        )  # fmt: skip
        if not self.streamed:
            source = _MapSource(self.make(epoch), self.read, config.seed, epoch, config.unreadable)
            batches = list(self._places(epoch, start))
            loader, skipped = DataLoader(source, batch_sampler=batches, **common), 0
        else:
            dataset = self.make(epoch)
            dataset.set_epoch(epoch)
            dataset.set_loader_cfg(num_workers=config.workers)
            source = _StreamSource(dataset, self.read, config.seed, epoch)
            loader, skipped = DataLoader(source, batch_size=share, drop_last=self.training, **common), start
        try:
            number = -1
            for number, batch in enumerate(itertools.islice(loader, self.batches - start + skipped)):
                if number >= skipped:
                    yield batch
            if number + 1 != self.batches - start + skipped:
                raise DataError(
                    f"data: the split {self.split!r} gave {number + 1} batches, expected {self.batches} of "
                    f"{self.batch_size} images; num_train_samples and num_val_samples say how many images there are"
                )
        except DataError as error:
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None


def _transform(config: TrainConfig, data_config: dict[str, Any], training: bool) -> Callable:
    if not training:
        return create_transform(**data_config, is_training=False)
    try:
        return create_transform(
            input_size=data_config["input_size"],
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.train_interpolation,
            mean=data_config["mean"],
            std=data_config["std"],
            re_prob=config.reprob,
            re_mode=config.remode,
        )
    except (AssertionError, KeyError, ValueError) as error:
        policy = f"auto_augment {config.auto_augment!r} and train_interpolation {config.train_interpolation!r}"
        raise ConfigError(f"{policy}: not an augmentation of timm's ({one_line(error)})") from error


def open_source(
    config: TrainConfig, world: World, data_config: dict[str, Any], frames: int | None, training: bool, batch_size: int
) -> Source:
    """Open a split of the recipe's dataset.

    Args:
        config: The recipe.
        world: The processes.
        data_config: As ``timm.data.resolve_data_config`` gives it.
        frames: Frames of the model's clips; None for images.
        training: The training split, shuffled and augmented; else the evaluation split.
        batch_size: Images a batch, over all processes.

    Returns:
        The source.

    Raises:
        DataError: There are no such images, or too few.
    """
    if not config.data and "/" not in config.dataset:
        raise DataError("data: expected the folder of the images, data=FOLDER")
    split = config.train_split if training else config.val_split
    mode = "L" if data_config["input_size"][0] == 1 else "RGB"
    samples = config.num_train_samples if training else config.num_val_samples

    def make(epoch: int) -> Any:
        kwargs = {} if config.dataset.startswith("torch/") else {"input_img_mode": mode}
        extensions = contextlib.nullcontext() if frames is None else videos_count_as_images()
        try:
            with extensions:
                return create_dataset(
                    config.dataset,
                    root=config.data or None,
                    split=split,
                    is_training=training,
                    batch_size=batch_size // world.size,
                    seed=config.seed + epoch,
                    num_samples=samples,
                    **kwargs,
                )
        except (OSError, RuntimeError, ValueError, AssertionError, KeyError) as error:
            reason = one_line(error) if str(error) else "no such folder"
            raise DataError(f"data: no images of the split {split!r} in {config.data!r} ({reason})") from error

    dataset = make(0)
    reader = getattr(dataset, "reader", None)
    read = _Reader(_transform(config, data_config, training), mode, frames, config.frame_stride, training)
    classes = dict(getattr(reader, "class_to_idx", None) or {})
    streamed = isinstance(dataset, IterableDataset)
    source = Source(config, world, split, training, batch_size, make, read, len(dataset), classes, streamed)
    if training and not source.batches:
        raise DataError(f"batch_size: {batch_size} images a step, but the split {split!r} has only {len(dataset)}")
    return source
