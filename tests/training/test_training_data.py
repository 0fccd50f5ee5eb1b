"""Images for training: published preprocessing, orders that resume, and what is wrong with a dataset, in a sentence."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import time

import numpy as np
import pytest
import timm
import torch
from digit_folder import write_digits
from PIL import Image
from runs import TINY
from runs import _context as processes

from visionmamba.training import ConfigError, DataError, TrainConfig, Trainer
from visionmamba.training.clips import clip_positions
from visionmamba.training.data import Source, _Reader, open_source
from visionmamba.training.distributed import World
from visionmamba.training.engine import create_model, data_settings
from visionmamba.training.run import main, validate

HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), 64, 61)


def _source(config, training=True, world=HERE, batch_size=16):
    model = create_model(config)
    settings, frames = data_settings(config, model), getattr(model, "num_frames", None)
    return open_source(config, world, settings, frames, training, batch_size)


def _photo(path):
    pixels = np.random.default_rng(0).integers(0, 256, (301, 417, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).resize((417, 301), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.parametrize(
    "name", ["vim_tiny_patch16_224", "vmamba_tiny_s1l8", "plainmamba_l1", "local_vim_tiny", "local_vssm_tiny",
             "efficient_vmamba_tiny", "mamba2d_small_patch8_224"],
)  # fmt: skip
def test_evaluation_preprocessing_is_the_published_one(name, tmp_path):
    """Resize the short side to 256 with bicubic, crop the middle 224, normalise with ImageNet's mean and deviation."""
    from torchvision import transforms

    path = _photo(tmp_path / "val" / "a" / "photo.png")
    config = TrainConfig(model=name, data=str(tmp_path), workers=0)
    with torch.device("meta"):
        model = create_model(config)
    source = open_source(config, HERE, data_settings(config, model), None, False, 1)
    ((image, label),) = source.loader()
    published = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    timms = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg))
    assert label.tolist() == [0]
    torch.testing.assert_close(image[0], published(Image.open(path)), rtol=0, atol=1e-6)
    assert torch.equal(image[0], timms(Image.open(path)))


def test_any_step_of_an_epoch_can_be_the_first(digits):
    config = TrainConfig(**TINY, data=str(digits), reprob=0.5, repeats=2, auto_augment="rand-m5")
    whole = list(_source(config).loader(epoch=3))
    rest = list(_source(config).loader(epoch=3, start=2))
    assert len(whole) == 4
    for (x, y), (x2, y2) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    other = next(iter(_source(config).loader(epoch=4)))
    assert not torch.equal(whole[0][0], other[0])


def test_processes_and_workers_share_the_same_batches(digits):
    config = TrainConfig(**TINY, data=str(digits), repeats=2, reprob=0.5)
    (whole, labels), *_ = _source(config).loader(epoch=1)
    for rank in range(2):
        world = World(rank, 2, torch.device("cpu"))
        (part, its_labels), *_ = _source(TrainConfig(**{**TINY, "workers": 1}, data=str(digits), repeats=2, reprob=0.5),
                                         world=world).loader(epoch=1)  # fmt: skip
        assert torch.equal(part, whole[rank::2])
        assert torch.equal(its_labels, labels[rank::2])
    pairs = whole.unflatten(0, (-1, 2))
    assert torch.equal(labels[::2], labels[1::2])  # two views of each image in a row, augmented apart
    assert not torch.equal(pairs[:, 0], pairs[:, 1])


def test_every_image_is_evaluated_once(digits):
    config = TrainConfig(**TINY, data=str(digits))
    labels = []
    for rank in range(3):
        source = _source(config, training=False, world=World(rank, 3, torch.device("cpu")), batch_size=24)
        parts = [y for _, y in source.loader()]
        assert [len(part) for part in parts] == [8, 8, 8]  # every process takes part in every batch
        labels += torch.cat(parts).tolist()
    assert labels.count(-1) == 72 - 61
    assert len([label for label in labels if label >= 0]) == 61


def test_clips_are_made_of_animated_images(tmp_path):
    frames = [Image.new("L", (40, 40), shade) for shade in (0, 100, 200)]
    (tmp_path / "val" / "a").mkdir(parents=True)
    frames[0].save(tmp_path / "val" / "a" / "x.png", save_all=True, append_images=frames[1:])
    config = TrainConfig(model="test_mamba3d", data=str(tmp_path), workers=0)
    ((clip, _),) = _source(config, training=False, batch_size=1).loader()
    assert clip.shape == (1, 3, 8, 32, 32)
    assert clip[0, 0, :, 16, 16].unique().numel() == 3


def _write_video(path, shades):
    """Write a video whose frames are of one shade each."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 40
        for shade in shades:
            frame = av.VideoFrame.from_ndarray(np.full((40, 40, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _shades(clip):
    """Return the shade of each frame of a clip (3, T, H, W), normalised by ImageNet's figures."""
    return (255 * (clip[0, :, 16, 16] * 0.229 + 0.485)).tolist()


def test_clips_of_videos(tmp_path):
    _write_video(tmp_path / "val" / "a" / "x.avi", range(0, 240, 6))
    _write_video(tmp_path / "val" / "b" / "short.avi", (0, 60, 120))
    config = TrainConfig(model="test_mamba3d", data=str(tmp_path), workers=0, frame_stride=2)
    ((clips, labels),) = _source(config, training=False, batch_size=2).loader()
    assert labels.tolist() == [0, 1]
    assert clips.shape == (2, 3, 8, 32, 32)
    middle = [6.0 * frame for frame in range(13, 29, 2)]  # of 40 frames, a clip of 15
    assert _shades(clips[0]) == pytest.approx(middle, abs=6)  # the codec's loss; a frame is 6 from its neighbours
    assert _shades(clips[1]) == pytest.approx([0, 120] + [120] * 6, abs=6)


def test_clips_begin_anywhere_in_training_but_alike_for_a_place(tmp_path):
    for name in "abcd":
        _write_video(tmp_path / "train" / name / "x.avi", range(0, 240, 6))
    config = TrainConfig(model="test_mamba3d", data=str(tmp_path), workers=0, frame_stride=2, scale=(1, 1))
    (first, _), (again, _) = (next(iter(_source(config, batch_size=4).loader(epoch=1))) for _ in range(2))
    assert torch.equal(first, again)
    starts = [_shades(clip)[0] for clip in first]
    assert len({round(start / 6) for start in starts}) > 1
    steps = [np.diff(_shades(clip)) for clip in first]
    np.testing.assert_allclose(steps, 12, atol=7)


def test_a_broken_video_is_named(tmp_path):
    _write_video(tmp_path / "val" / "a" / "x.avi", range(4))
    (tmp_path / "val" / "a" / "broken.mp4").write_bytes(b"no video")
    config = TrainConfig(model="test_mamba3d", data=str(tmp_path), workers=0)
    with pytest.raises(DataError, match=r"broken.mp4 cannot be read as an image \(not a readable video"):
        list(_source(config, training=False, batch_size=2).loader())


@pytest.mark.parametrize(
    ("length", "stride", "expected"),
    [(9, None, [0, 3, 5, 8]), (1, None, [0] * 4), (10, 2, [2, 4, 6, 8]), (7, 2, [0, 2, 4, 6]), (3, 2, [0, 2, 2, 2])],
)
def test_positions_of_a_clip(length, stride, expected):
    assert clip_positions(length, 4, stride, training=False) == expected


def test_webdataset(tmp_path, digits):
    pytest.importorskip("webdataset")
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"digits-{split}-0000.tar", "w") as tar:
            for index in range(32):
                buffer = io.BytesIO()
                Image.new("RGB", (20, 20), (index * 8 % 256, 0, 0)).save(buffer, format="PNG")
                for suffix, data in (("png", buffer.getvalue()), ("cls", str(index % 3).encode())):
                    info = tarfile.TarInfo(f"{index:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    info = {split: {"name": split, "filenames": [f"digits-{split}-0000.tar"], "shard_lengths": [32], "num_samples": 32}
            for split in ("train", "validation")}  # fmt: skip
    (tmp_path / "_info.json").write_text(json.dumps({"splits": info}))
    config = TrainConfig(**{**TINY, "in_chans": 3}, dataset="wds/digits", data=str(tmp_path), num_classes=3)
    first, again = (list(_source(config).loader(epoch=2, start=start)) for start in (0, 1))
    assert [len(y) for _, y in first] == [16, 16]
    assert torch.equal(first[1][0], again[0][0])
    assert sorted(torch.cat([y for _, y in first]).tolist()) == sorted(index % 3 for index in range(32))


def test_hugging_face_datasets(digits):
    pytest.importorskip("datasets")
    config = TrainConfig(**TINY, dataset=f"hfds/{digits}", num_classes=10)
    (x, y), *rest = _source(config).loader()
    assert x.shape == (16, 1, 32, 32)
    assert len(rest) == 3
    assert set(y.tolist()) <= set(range(10))


class _Workers(torch.utils.data.Dataset):
    """Images whose reading tells which process reads them."""

    def __init__(self, tell):
        self.tell = tell

    def __getitem__(self, index):
        self.tell.send(os.getpid())
        return Image.new("L", (8, 8)), 0


def _nothing(image):
    return torch.zeros(1)


def _read_for_ever(tell):
    multiprocessing.set_start_method("forkserver", force=True)
    read = _Reader(_nothing, "L", None, None, True)
    config = TrainConfig(**{**TINY, "workers": 2})
    source = Source(config, HERE, "train", True, 16, lambda epoch: _Workers(tell), read, 64, {}, False)
    for _ in source.loader():
        time.sleep(3600)


def test_workers_leave_with_a_killed_training():
    """Python starts them by a fork server from 3.14 on, which hides the training's end from PyTorch's own watch."""
    heard, tell = multiprocessing.Pipe(duplex=False)
    training = processes.Process(target=_read_for_ever, args=(tell,))
    training.start()
    tell.close()
    workers = set()
    while len(workers) < 2:  # one may have read all it may before the other has started
        workers.add(heard.recv())
    training.kill()
    training.join()
    try:
        while heard.poll(300):  # the end of the pipe, when nobody is left to write to it
            heard.recv()
        pytest.fail(f"workers {workers} are still there")
    except EOFError:
        pass
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def _fails(config, match, kind=DataError):
    with pytest.raises(kind, match=match) as error:
        Trainer(TrainConfig(**config), HERE).run()
    assert "\n" not in str(error.value)


def test_no_images(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    _fails(dict(TINY, data=str(tmp_path)), "data: no images of the split 'train' in")
    _fails(dict(TINY, data=str(tmp_path / "none")), "data: no images of the split 'train' in")


def test_one_class(tmp_path):
    for split in ("train", "val"):
        _photo(tmp_path / split / "cat" / "1.png")
    _fails(dict(TINY, data=str(tmp_path), batch_size=1), "one class only, 'cat'; a classifier needs two")


def test_wrong_number_of_classes(digits, tmp_path):
    config = dict(TINY, data=str(digits), out=str(tmp_path))
    _fails(dict(config, num_classes=7), "num_classes: the recipe says 7, the training split has 10")
    for split, classes in (("train", "ab"), ("val", "abc")):
        for name in classes:
            _photo(tmp_path / "odd" / split / name / "1.png")
    _fails(dict(config, data=str(tmp_path / "odd"), batch_size=2), "the two splits have different classes, such as c")


def test_fewer_images_than_a_step(digits):
    _fails(dict(TINY, data=str(digits), batch_size=128), "batch_size: 128 images a step, but .* has only 64")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files(tmp_path, workers):
    root = write_digits(tmp_path / "digits", 64, 61)
    bad = root / "train" / "3" / "broken.png"
    bad.write_bytes(b"not an image")
    config = dict(TINY, data=str(root), out=str(tmp_path / "run"), epochs=1, batch_size=13, workers=workers)
    _fails(config, rf"{bad} cannot be read as an image \(.*\); unreadable=skip goes on")
    if not workers:
        with pytest.warns(UserWarning, match="skipped .*broken.png"):
            assert Trainer(TrainConfig(**config, unreadable="skip"), HERE).run()["step"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=15, accumulate=2), "15 images a step cannot be divided among 1 processes with 2 passes each"),
        (dict(batch_size=20, accumulate=4, mixup=1.0), "mixup and cutmix pair images, and a pass has 5"),
    ],
)
def test_batches_that_cannot_be_divided(changes, message, digits):
    with pytest.raises(ConfigError, match=message):
        Trainer(TrainConfig(**{**TINY, "data": str(digits), **changes}), HERE)


def test_processes_that_do_not_divide_the_batch(digits):
    with pytest.raises(ConfigError, match="batch_size: 16 images a step cannot be divided among 3 processes"):
        Trainer(TrainConfig(**TINY, data=str(digits)), World(0, 3, torch.device("cpu")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(opt="adamm"), "opt: unknown optimiser 'adamm'; did you mean adam"),
        (dict(opt="adam", betas=(2.0, 0.9)), "opt: adam does not take the recipe's values .*beta"),
        (dict(auto_augment="foo"), "auto_augment 'foo' .* not an augmentation of timm's"),
        (dict(model_args={"foo": 1}), "model: test_vmamba cannot be made as the recipe says .*'foo'"),
    ],
)
def test_what_timm_does_not_take_is_named(changes, message, digits, tmp_path):
    _fails({**TINY, "data": str(digits), "out": str(tmp_path), **changes}, message, ConfigError)


@pytest.mark.parametrize("program", [main, validate])
def test_programs_print_one_line(program, capsys, tmp_path):
    for words, message in (
        (["epoch=3"], "did you mean epochs"),
        (["model=test_vmmba"], "did you mean test_vmamba"),
        (["model=test_vmamba", "device=abacus"], "device: abacus cannot be used"),
        (["model=test_vmamba", f"data={tmp_path}", "device=cpu", "checkpoint=none.pth"], "error: "),
    ):
        assert program(words) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
