"""Flags of data and augmentation, from the command line to the batch, the checkpoint and infer.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import arguments, make_tree

import infer
from inputs.data import build_data
from inputs.transforms import train_transform
from models import load_checkpoint
from runtime.processes import Distributed
from tests.tiny_runs import TINY, last, rows, train
from utils import UserError, seeded

IMAGES = ["--data-set", "FOLDER", "--epochs", "1", "--batch-size", "8", "--mixup", "0", "--cutmix", "0"]
SMALL = [word for word in TINY if word not in ("--classes", "0,7")]


def save_grey_scans(root) -> None:
    """12-bit images of 16-bit files, bright in one class and dark in the other."""
    for split in ("train", "val"):
        for label, name in enumerate(("bright", "dark")):
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                levels = np.random.RandomState(i).randint(0, 2000, (40, 40)) + (2000 if label == 0 else 0)
                Image.fromarray(levels.astype(np.uint16)).save(root / split / name / f"{i}.png")


@pytest.mark.slow
def test_grey_scans_of_twelve_bits_are_trained_on_and_evaluated(tmp_path, capsys):
    save_grey_scans(tmp_path / "scans")
    grey = ["--in-chans", "1", "--mean", "0.5", "--std", "0.25", "--pixel-range", "0", "4095"]
    data = ["--data-path", str(tmp_path / "scans"), *IMAGES]
    train(tmp_path / "run", *data, *grey, "--aa", "rand-m9", model=SMALL)
    assert "2 classes, 16 training and 16 validation images" in capsys.readouterr().out
    state = last(tmp_path / "run")
    assert state["model"]["patch_embed.proj.weight"].shape[1] == 1
    assert (state["mean"], state["std"]) == ([0.5], [0.25])
    infer.main(["--model-path", str(tmp_path / "run" / "checkpoint_last.pth"), "--data-path", str(tmp_path / "scans")])
    found = json.loads((tmp_path / "run" / "checkpoint_last_folder.json").read_text())
    assert found["acc1"] == pytest.approx(rows(tmp_path / "run")[-1]["test_acc1"])
    assert found["loss"] == pytest.approx(rows(tmp_path / "run")[-1]["test_loss"], abs=1e-5)
    scan = str(tmp_path / "scans" / "val" / "dark" / "0.png")
    infer.main(["--model-path", str(tmp_path / "run" / "checkpoint_last.pth"), "--image", scan])
    assert "(true: dark)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pretrained_stem_is_adapted_to_other_channels_as_timm_does(tmp_path):
    make_tree(tmp_path / "images", images=8)
    data = ["--data-path", str(tmp_path / "images"), *IMAGES]
    train(tmp_path / "rgb", *data, model=SMALL)
    stem = load_checkpoint(tmp_path / "rgb").model.patch_embed.proj.weight
    weights = str(tmp_path / "rgb" / "checkpoint_last.pth")
    for channels, expected in ((1, stem.sum(1, keepdim=True)), (4, torch.cat([stem, stem[:, :1]], 1) * 3 / 4)):
        folder = tmp_path / str(channels)
        train(folder, *data, "--in-chans", str(channels), "--finetune", weights, "--lr", "0", model=SMALL)
        torch.testing.assert_close(last(folder)["model"]["patch_embed.proj.weight"], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--class-weights", "auto"], ["--bce-loss", "--balanced-sampling", "--mixup", "0.8"]]
)
def test_losses_and_sampling_for_unequal_classes_train(tmp_path, flags):
    make_tree(tmp_path / "images", images=8)
    for i in range(2, 8):
        (tmp_path / "images" / "train" / "dog" / f"{i}.png").unlink()
    found = train(tmp_path / "run", *["--data-path", str(tmp_path / "images"), *IMAGES], *flags, model=SMALL)
    assert 0 < found[-1]["train_loss"] < 2


def test_channels_and_statistics_reach_the_batches(tmp_path):
    make_tree(tmp_path)
    for channels, mean in ((1, (0.449,)), (3, (0.485, 0.456, 0.406)), (4, (0.449,) * 4)):
        aa = "" if channels == 4 else "rand-m9-mstd0.5-inc1"
        data = build_data(arguments(data_set="FOLDER", data_path=tmp_path, in_chans=channels, aa=aa), Distributed())
        assert data.mean == pytest.approx(mean)
        assert next(data.train.epoch(0)).images.shape == next(iter(data.val)).images.shape == (4, channels, 32, 32)
    args = arguments(data_set="FOLDER", data_path=tmp_path, mean=[0.0], std=[1.0])
    pixels = next(iter(build_data(args, Distributed()).val)).images
    assert pixels[0, :, 16, 16].tolist() == pytest.approx([40 / 255, 100 / 255, 200 / 255])


def test_timms_augmentation_flags_do_what_they_say():
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (80, 60, 3), dtype=np.uint8))

    def augmented(**flags):
        with seeded("flags"):
            return train_transform(48, color_jitter=0, **flags)(photo)

    plain = augmented(hflip=0, vflip=0)
    assert torch.equal(augmented(hflip=1, vflip=0).flip(-1), plain)
    assert torch.equal(augmented(hflip=0, vflip=1).flip(-2), plain)
    tall = augmented(hflip=0, scale=(1, 1), ratio=(3 / 4, 3 / 4))  # the whole image
    assert torch.equal(
        tall, torch.tensor(np.asarray(photo.resize((48, 48), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    )
    left_alone = [train_transform(48, no_aug=True, aa="rand-m9-mstd0.5-inc1")(photo) for _ in range(2)]
    assert torch.equal(*left_alone)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--in-chans", "4", "--aa", "rand-m9"], "--in-chans 4 excludes --aa"),
        (["--mean", "0.5", "0.5"], "one number, or one for each of --in-chans 3"),
        (["--pixel-range", "5", "5"], "--pixel-range: MIN must be below MAX"),
    ],
)
def test_contradictory_flags_are_one_line(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", *flags, model=SMALL)
