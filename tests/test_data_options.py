"""Flags of data and augmentation, from the command line to the batch, the checkpoint and infer.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import arguments, make_tree

import infer
from inputs.catalogue import build_dataset
from inputs.data import build_data, chosen_preprocessing
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
    found = json.loads((tmp_path / "run" / "checkpoint_last_scans.json").read_text())
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
        args = arguments(data_set="FOLDER", data_path=tmp_path, in_chans=channels, aa=aa)
        train, val = build_data(args, Distributed())
        assert chosen_preprocessing(args)["mean"] == pytest.approx(mean)
        assert next(train.epoch(0)).images.shape == next(iter(val)).images.shape == (4, channels, 32, 32)
    args = arguments(data_set="FOLDER", data_path=tmp_path, mean=[0.0], std=[1.0])
    pixels = next(iter(build_data(args, Distributed())[1])).images
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


def write_table(path, rows, header="file,label") -> str:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


def csv_rows(dataset) -> list[tuple[str, str]]:
    """(file, name of its class) of all images, each of them read."""
    labels = [dataset.class_names[dataset.load(i)[1]] for i in range(len(dataset))]
    return [(dataset.path(i), label) for i, label in enumerate(labels)]


def test_a_table_is_split_by_a_column_a_second_table_or_a_share(tmp_path):
    folder = make_tree(tmp_path / "images", images=3) / "train"
    files = [(f"train/{name}/{i}.png", name) for name in ("dog", "cat") for i in range(3)]
    rows = [(str(tmp_path / "images" / file), name) for file, name in files]
    splits = ["train", "val", "test", "train", "validation", "holdout"]
    table = tmp_path / "images" / "labels.csv"
    write_table(
        table, [(*row, split) for row, split in zip(files, splits, strict=True)] + [("", "dog", "train")], "f,l,s"
    )
    found = {
        split: build_dataset("CSV", table, split, csv_columns=("f", "l", "s")) for split in ("train", "val", "test")
    }
    assert {split: csv_rows(dataset) for split, dataset in found.items()} == {
        "train": [rows[0], rows[3]],
        "val": [rows[1]],
        "test": [rows[2]],
    }
    assert found["val"].class_names == ("cat", "dog")
    assert found["train"].left_out == [f"{table}:8 (no f or no l)", f"{rows[5][0]} (its split is 'holdout')"]

    write_table(table, files[:4])
    second = write_table(folder / "more.csv", [(file.removeprefix("train/"), name) for file, name in files[4:]])
    train_set, val_set = (build_dataset("CSV", table, split, val_path=second) for split in ("train", "val"))
    assert (csv_rows(train_set), csv_rows(val_set)) == (rows[:4], rows[4:])

    write_table(table, files)
    parts = [csv_rows(build_dataset("CSV", table, split, val_split=(0.34, 0))) for split in ("train", "val")]
    assert [len(part) for part in parts] == [4, 2] and sorted(parts[0] + parts[1]) == sorted(rows)
    assert csv_rows(build_dataset("CSV", table, "val")) == rows  # evaluation of all


def test_labels_of_a_table_are_any_text_and_numbers_count_by_value(tmp_path):
    image = make_tree(tmp_path) / "train" / "cat" / "0.png"
    for labels, expected in (([10, 9, 2], ("2", "9", "10")), (["b 1", "é", "10"], ("10", "b 1", "é"))):
        table = write_table(tmp_path / "labels.csv", [(image, label) for label in labels])
        assert build_dataset("CSV", table, "val").class_names == expected


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("file,label\na.png,x\n", {}, "--val-path, --val-split or a split column"),
        ("path,label\na.png,x\n", {}, "no column 'file' .its columns: path, label.; --csv-columns"),
        ("", {}, "no column 'file' .its columns: none"),
        ("file,label,s\na.png,x,val\n", {"csv_columns": ("file", "label", "s")}, "expected rows whose s is train"),
        ("file,label\na.png,x\n", {"val_split": (0.5, 0)}, "class x has a single image"),
        (
            "file,label,s\na.png,x,train\n",
            {"csv_columns": ("file", "label", "s"), "val_split": (0.5, 0)},
            "use only one of --val-split and a split column",
        ),
        ("file,label\na.png,x\n", {"val_path": "b.csv", "val_split": (0.5, 0)}, "one of --val-path and --val-split"),
        ("file,label\na.png,x\n", {"val_path": "gone.csv"}, "gone.csv: not a readable CSV table: .*No such file"),
    ],
)
def test_mistakes_with_tables_are_one_line(tmp_path, text, options, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        build_dataset("CSV", tmp_path / "labels.csv", "train", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_table_is_trained_on_and_another_evaluated_by_its_classes_names(tmp_path, capsys):
    make_tree(tmp_path, images=8)
    table = write_table(
        tmp_path / "a.csv", [(f"train/{name}/{i}.png", name) for name in ("cat", "dog") for i in range(8)]
    )
    train(tmp_path / "run", "--data-path", table, "--val-split", "0.25", *IMAGES[2:], model=SMALL)
    assert "CSV at 32x32 (evaluation crop 1), 2 classes, 12 training and 4 validation images" in capsys.readouterr().out
    other = write_table(tmp_path / "b.csv", [(f"val/dog/{i}.png", "dog") for i in range(8)])
    infer.main(["--model-path", str(tmp_path / "run"), "--data-path", other, "--val-split", "0.5"])
    assert "4 images" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file"):
        infer.main(["--model-path", str(tmp_path / "run"), "--data-path", str(tmp_path / "c.csv")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--in-chans", "4", "--aa", "rand-m9"], "--in-chans 4 excludes --aa"),
        (["--mean", "0.5", "0.5"], "one number from 0 to 1, or one for each of --in-chans 3"),
        (["--mean", "123.7", "116.3", "103.5"], "one number from 0 to 1"),
        (["--pixel-range", "5", "5"], "--pixel-range: MIN must be below MAX"),
    ],
)
def test_contradictory_flags_are_one_line(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", *flags, model=SMALL)
