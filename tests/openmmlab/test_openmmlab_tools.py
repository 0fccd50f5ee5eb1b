"""The command line tools for detection and segmentation, and the digit scenes that they are tried on."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from make_digit_scenes import make_digit_scenes  # noqa: E402

_REASON = 'needs OpenMMLab: pip install "visionmamba[openmmlab]"'
DETECTION = ROOT / "configs/detection/digit_scenes/mask-rcnn_vmamba-t-s1l8_fpn_1xb16-36e_digit-scenes.py"
SEGMENTATION = ROOT / "configs/segmentation/digit_scenes/vmamba-t-s1l8_upernet_1xb16-4k_digit-scenes-256x256.py"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "scenes"
    make_digit_scenes(folder, train=4, val=3, size=96)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_digit_scenes_are_deterministic(scenes, tmp_path):
    make_digit_scenes(tmp_path / "again", train=4, val=3, size=96)
    assert contents(tmp_path / "again") == contents(scenes)
    make_digit_scenes(tmp_path / "other", train=4, val=3, size=96, seed=1)
    assert contents(tmp_path / "other")["val/images/000000.png"] != contents(scenes)["val/images/000000.png"]


def test_digit_scenes_agree_with_themselves(scenes):
    """Masks, boxes, areas and label maps say the same; pycocotools reads them."""
    coco = pytest.importorskip("pycocotools.coco", reason="needs pycocotools").COCO(scenes / "train/annotations.json")
    assert len(coco.imgs) == 4
    covered = {}
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation).astype(bool)
        name = coco.imgs[annotation["image_id"]]["file_name"]
        labels = np.array(Image.open(scenes / "train/labels" / name))
        assert mask.sum() == annotation["area"] > 0
        assert (labels[mask] == annotation["category_id"]).all()
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        assert (columns.min(), rows.min()) == (x, y)
        assert (columns.max() + 1, rows.max() + 1) == (x + width, y + height)
        covered[name] = covered.get(name, 0) + annotation["area"]
    for name, area in covered.items():
        assert (np.array(Image.open(scenes / "train/labels" / name)) > 0).sum() == area


def test_digit_scenes_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    import make_digit_scenes as module

    monkeypatch.setattr(module, "_annotation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_digit_scenes(tmp_path / "scenes", train=2, val=1, size=64)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "scenes").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        make_digit_scenes(tmp_path / "scenes", train=2, val=1, size=64)
    with pytest.raises(ValueError, match="at least 64, 1 and 1, got 32, 2 and 1"):
        make_digit_scenes(tmp_path / "small", train=2, val=1, size=32)


def load(path, scenes, **options):
    """Return a config of the digit scenes with a micro backbone."""
    pytest.importorskip("visionmamba.openmmlab", reason=_REASON, exc_type=ImportError)
    from visionmamba.openmmlab.runner import load_config

    data = {f"{name}_dataloader.dataset.data_root": f"{scenes}/" for name in ("train", "val")}
    return load_config(str(path), {**data, "model.backbone.model_name": "test_vmamba", **options})


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (DETECTION, {"model.neck.in_channels": [24, 48, 64, 96]}),
        (
            SEGMENTATION,
            {
                "model.decode_head.in_channels": [24, 48, 64, 96],
                "model.decode_head.channels": 16,
                "model.auxiliary_head.in_channels": 64,
                "model.data_preprocessor.size": (96, 96),
            },
        ),
    ],
    ids=["detection", "segmentation"],
)
def test_browse_and_predict_folder(path, options, scenes, tmp_path):
    pytest.importorskip("visionmamba.openmmlab", reason=_REASON, exc_type=ImportError)
    config = load(path, scenes, **options)
    import torch

    from visionmamba.openmmlab.pictures import browse, predict_folder
    from visionmamba.openmmlab.runner import build_model

    first = Image.open(browse(config, tmp_path / "browse", "train", 1)[0])
    assert first.size == ((256, 256) if path == DETECTION else (96, 96))  # only the detector's recipe resizes
    drawn = browse(config, tmp_path / "browse", "val", 2)
    assert [Image.open(picture).size for picture in drawn] == [(96, 96)] * 2
    torch.manual_seed(0)
    model = build_model(config)
    checkpoint = tmp_path / "weights.pth"
    classes = config.val_dataloader.dataset.metainfo
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": dict(classes)}}, checkpoint)
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deep/b.png")):
        (folder / name).write_bytes((scenes / f"val/images/00000{number}.png").read_bytes())
    Image.new("RGB", (40, 56)).save(folder / "plain.jpg")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not an image")
    out = tmp_path / "out"
    problems = dict(predict_folder(config, str(checkpoint), folder, out, score_thr=0.05))
    assert {path.name for path, problem in problems.items() if problem} == {"empty.png", "text.png"}
    names = {"a.png", "deep/b.png", "plain.jpg.png"}
    assert {str(p.relative_to(out / "pictures")) for p in (out / "pictures").rglob("*.png")} == names
    if path == SEGMENTATION:
        assert np.array(Image.open(out / "labels/plain.jpg.png")).shape == (56, 40)
        assert np.array(Image.open(out / "labels/a.png")).max() <= 10
        return
    predictions = json.loads((out / "predictions.json").read_text())
    assert set(predictions["images"]) == {"a.png", "deep/b.png", "plain.jpg"}
    for row in predictions["images"]["plain.jpg"]:
        x1, y1, x2, y2 = row["bbox"]
        assert 0 <= x1 <= x2 <= 40
        assert 0 <= y1 <= y2 <= 56
        assert row["mask"]["size"] == [56, 40]
    with pytest.raises(FileNotFoundError, match=r"nothing: no images \(\.bmp"):
        list(predict_folder(config, str(checkpoint), tmp_path / "nothing", out))


def test_report_of_a_resumed_training(tmp_path):
    from training_report import read_log, summarise, write_csv

    for folder, steps in (("1", (1, 2, 3)), ("2", (3, 4))):
        log = tmp_path / folder / "vis_data"
        log.mkdir(parents=True)
        rows = [{"loss": 10.0 - step, "step": step} for step in steps] + [{"mIoU": 50.0 + steps[-1], "step": steps[-1]}]
        (log / "scalars.json").write_text("\n".join(map(json.dumps, rows)))
    losses, metrics = read_log(tmp_path)
    assert losses == {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}
    assert summarise(losses, metrics) == {"steps": 4, "first_loss": 9.0, "last_loss": 6.0, "metrics": {"mIoU": 54.0}}
    write_csv(tmp_path / "curves.csv", {"seg": (losses, metrics)})
    rows = (tmp_path / "curves.csv").read_text().splitlines()
    assert rows[:2] == ["training,step,quantity,value", "seg,1,loss,9"]
    assert rows[-1] == "seg,4,mIoU,54"
    assert len(rows) == 7
    with pytest.raises(FileNotFoundError, match=r"no .*scalars\.json"):
        read_log(tmp_path / "nothing")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_trainings_resume(tmp_path):
    pytest.importorskip("visionmamba.openmmlab", reason=_REASON, exc_type=ImportError)
    command = [sys.executable, str(ROOT / "tools/check_resume.py"), str(tmp_path / "work")]
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert completed.stdout.count("killed, resumed, nothing lost") == 2


@pytest.mark.slow
def test_two_processes_train_without_a_gpu(scenes, tmp_path):
    """By torchrun, with gloo: each sees its half of the batches, both together are validated."""
    pytest.importorskip("visionmamba.openmmlab", reason=_REASON, exc_type=ImportError)
    settings = ("num_workers=0", "persistent_workers=False", f"dataset.data_root={scenes}/")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        str(ROOT / "tools/seg_train.py"), str(SEGMENTATION), "--launcher", "pytorch",
        "--work-dir", str(tmp_path / "work"), "--cfg-options",
        *(f"{name}_dataloader.{setting}" for name in ("train", "val", "test") for setting in settings),
        "model.backbone.model_name=test_vmamba", "model.decode_head.in_channels=[24,48,64,96]",
        "model.decode_head.channels=16", "model.auxiliary_head.in_channels=64",
        "model.data_preprocessor.size=(96,96)", "train_dataloader.batch_size=2", "train_cfg.max_iters=2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-3000:]
    output = completed.stdout + completed.stderr
    assert "Distributed training: True" in output
    assert "GPU number: 2" in output
    assert output.count("mIoU: ") == 1
    assert (tmp_path / "work/iter_2.pth").is_file()


def refusal(capsys, main, *arguments):
    """Return what a tool says as it ends because of its arguments."""
    with pytest.raises(SystemExit) as error:
        main("A tool.", list(map(str, arguments)))
    assert error.value.code in (1, 2)
    return capsys.readouterr().err.splitlines()[-1].partition(" error: ")[2]


def test_wrong_arguments_end_in_one_sentence(scenes, tmp_path, capsys):
    pytest.importorskip("visionmamba.openmmlab", reason=_REASON, exc_type=ImportError)
    from visionmamba.openmmlab.runner import test_main as evaluate
    from visionmamba.openmmlab.runner import train_main as train

    work = ("--work-dir", tmp_path / "work")
    small = ("model.backbone.model_name=test_vmamba", "model.neck.in_channels=[24,48,64,96]")
    assert refusal(capsys, train, "nowhere.py").startswith("nowhere.py: no such config; expected a path")
    assert refusal(capsys, train, "nothing::a/b.py").startswith("nothing::a/b.py: expected mmdet::... or mmseg::...")
    said = refusal(capsys, train, DETECTION, *work, "--cfg-options", "train_dataloder.batch_size=2")
    assert said.startswith("--cfg-options: no config has a 'train_dataloder'")
    assert "did you mean train_dataloader?" in said
    assert refusal(capsys, train, DETECTION, *work, "--cfg-options", "batch").endswith(
        "expected NAME=VALUE, got 'batch'"
    )
    said = refusal(capsys, train, DETECTION, *work, "--cfg-options", "model.backbone.model_name=vmamba_tinny")
    assert said.startswith("model_name: expected a model of images such as vmamba_tiny")
    said = refusal(capsys, train, DETECTION, *work, "--cfg-options", *small, "train_dataloader.dataset.data_root=lost/")
    assert "No such file or directory: 'lost/train/annotations.json'" in said
    assert "Traceback" not in said
    (tmp_path / "part.pth").write_bytes(b"PK\x03\x04 the beginning")
    for name, message in (
        ("part.pth", "not a readable checkpoint, perhaps truncated"),
        ("none.pth", "no such checkpoint"),
    ):
        said = refusal(capsys, evaluate, DETECTION, tmp_path / name, *work, "--cfg-options", *small)
        assert said.startswith(f"{tmp_path / name}: {message}")


def test_only_files_and_interrupts_end_a_training_in_one_sentence(capsys):
    pytest.importorskip("visionmamba.openmmlab", reason=_REASON, exc_type=ImportError)
    from visionmamba.openmmlab.runner import one_sentence

    parser = argparse.ArgumentParser(prog="train")
    worker = "Caught it in a worker.\nOriginal Traceback (most recent call last):\n  ...\nFileNotFoundError: lost.png\n"
    for error, status, said in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "runs"), 1, "error: [Errno 13] Permission denied: 'runs'"),
        (FileNotFoundError(worker), 1, "error: FileNotFoundError: lost.png"),
    ):
        with pytest.raises(SystemExit) as ended, one_sentence(parser):
            raise error
        assert (ended.value.code, capsys.readouterr().err) == (status, f"train: {said}\n")
    with pytest.raises(ZeroDivisionError), one_sentence(parser):
        raise ZeroDivisionError
