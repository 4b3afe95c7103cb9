"""infer.py for classifiers: evaluation, prediction, reports and explanations."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_sample_images

import infer
from inference import explanations
from inference.evaluate import average_mirrored
from models import load_checkpoint
from tests.untrained import save
from utils import MachineError, UserError


def run(*words):
    infer.main([str(word) for word in words] + ["--num-workers", "0", "--device", "cpu"])


def photographs(folder):
    folder.mkdir()
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
    return folder


def class_folders(root, classes, images=4, split="val"):
    """Create class folders of noise images."""
    for number, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for i in range(images + number):
            pixels = np.random.default_rng([number, i]).integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@torch.no_grad()
def logits_of(path, root, classes):
    """Return logits (images, classes) and true classes (images,) of class folders, without the code of infer.py."""
    loaded = load_checkpoint(path)
    files = [(file, i) for i, name in enumerate(classes) for file in sorted((root / "val" / name).glob("*.png"))]
    images = torch.stack([loaded.transform(Image.open(file)) for file, _ in files])
    return loaded.model(images), torch.tensor([label for _, label in files])


def test_evaluation_writes_what_it_prints_and_what_a_loop_over_the_images_finds(tmp_path, capsys):
    classes = ("a", "b", "c")
    root = class_folders(tmp_path / "data", classes)
    save(tmp_path / "a.pth", classes=classes, args={"data_set": "FOLDER"})
    words = ["--model-path", tmp_path / "a.pth", "--data-path", root, "--output", tmp_path / "results.json"]
    run(*words, "--report", tmp_path / "report", "--batch-size", "5")
    results = json.loads((tmp_path / "results.json").read_text())
    printed = capsys.readouterr().out
    assert f"acc@1 {results['acc1']:.2f} %" in printed and f"loss {results['loss']:.4f}" in printed
    logits, true = logits_of(tmp_path / "a.pth", root, classes)
    assert results["images"] == len(true) and results["correct1"] == int((logits.argmax(1) == true).sum())
    assert results["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, true)), abs=1e-5)

    rows = list(csv.reader((tmp_path / "report" / "confusion_matrix.csv").open()))
    counts = np.array([row[1:] for row in rows[1:]], dtype=int)
    assert counts.sum() == len(true) and counts.trace() == results["correct1"]
    per_class = list(csv.DictReader((tmp_path / "report" / "per_class.csv").open()))
    assert [int(row["correct"]) for row in sorted(per_class, key=lambda row: row["class"])] == [*counts.diagonal()]
    mean = np.mean([int(row["correct"]) / int(row["images"]) for row in per_class])
    assert results["mean_per_class"] == pytest.approx(100 * mean)
    with Image.open(tmp_path / "report" / "confusion_matrix.png") as picture:
        assert picture.width > 500


def test_data_that_lacks_some_of_the_models_classes_is_mapped_by_name(tmp_path, capsys):
    """The output has the accuracy over all of the model's classes and over those present in the data."""
    known, present = ("a", "b", "c", "d", "e"), ("b", "e", "d")
    root = class_folders(tmp_path / "data", present, images=9)
    save(tmp_path / "a.pth", classes=known)
    words = ["--model-path", tmp_path / "a.pth", "--data-set", "FOLDER", "--data-path", root]
    run(*words, "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    logits, true = logits_of(tmp_path / "a.pth", root, present)
    columns = torch.tensor([known.index(name) for name in present])
    assert results["acc1"] == pytest.approx(100 * float((logits.argmax(1) == columns[true]).float().mean()))
    among = (logits[:, columns].argmax(1) == true).float().mean()
    assert results["acc1_present"] == pytest.approx(100 * float(among))
    assert results["missing_classes"] == ["a", "c"] and results["acc1_present"] > results["acc1"]
    assert "2 of the model's 5 classes are not in the data (a, c)" in capsys.readouterr().out
    class_folders(root, ("a", "c"), split="test")
    class_folders(root, known, split="train")
    run(*words, "--split", "test", "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["missing_classes"] == ["b", "d", "e"]
    class_folders(root, ("cat", "dog"))
    with pytest.raises(UserError, match=r"does not know 2 of its 5 classes: cat, dog"):
        run(*words)


def test_a_model_of_some_of_a_data_sets_classes_is_evaluated_on_these(tmp_path):
    save(tmp_path / "a.pth", classes=("7", "3"), args={"data_set": "DIGITS", "classes": ["7", "3"]})
    run("--model-path", tmp_path / "a.pth", "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 36 + 37


def test_files_are_written_where_a_run_directory_or_the_command_line_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.pth", classes=("0", "1"), args={"data_set": "DIGITS", "classes": ["0", "1"]})
    before = sorted(tmp_path.rglob("*"))
    run("--model-path", "a.pth")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.yaml").touch()
    (tmp_path / "a.pth").rename(tmp_path / "run/checkpoint_best.pth")
    run("--model-path", "run")
    assert json.loads((tmp_path / "run/checkpoint_best_digits.json").read_text())["data_set"] == "DIGITS"
    for split in ("val", "test"):  # results of another folder or split overwrite nothing
        class_folders(tmp_path / "Clinic", ("0", "1"), split=split)
        run("--model-path", "run", "--data-set", "IMNET", "--data-path", "Clinic", "--split", split)
    assert {file.name for file in (tmp_path / "run").glob("*clinic*")} == {
        "checkpoint_best_clinic.json",
        "checkpoint_best_clinic_test.json",
    }


def test_mirrored_images_have_their_part_in_the_logits(tmp_path, capsys):
    model = save(tmp_path / "a.pth", args={"data_set": "DIGITS"})
    images = torch.randn(2, 3, 32, 32)
    expected = (model(images) + model(images.flip(-1))) / 2
    average_mirrored(model)
    assert torch.allclose(model(images), expected) and not torch.allclose(model(images), model.forward(images))
    run("--model-path", tmp_path / "a.pth", "--tta")
    assert "spectformer_ti with mirrored images on DIGITS" in capsys.readouterr().out
    with pytest.raises(UserError, match="--explain does not support --tta"):
        run("--model-path", tmp_path / "a.pth", "--tta", "--explain", "--image", tmp_path)


def test_images_that_training_held_back_are_those_that_are_evaluated(tmp_path):
    class_folders(tmp_path / "tree", ("a", "b"), images=9, split="")
    save(tmp_path / "a.pth", args={"data_set": "FOLDER", "val_split": [0.2, 3]}, classes=("a", "b"))
    words = ["--model-path", tmp_path / "a.pth", "--data-path", tmp_path / "tree", "--output", tmp_path / "r.json"]
    run(*words)
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 4
    run(*words, "--val-split", "0.5")
    assert json.loads((tmp_path / "r.json").read_text())["images"] in (9, 10)


def test_a_tables_split_column_replaces_the_share_that_training_held_back(tmp_path):
    class_folders(tmp_path, ("a", "b"), images=3, split="")
    rows = [f"{name}/{i}.png,{name},{'test' if i else 'train'}" for name in "ab" for i in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(["file,label,s", *rows]))
    save(tmp_path / "a.pth", args={"data_set": "CSV", "val_split": [0.2, 3]}, classes=("a", "b"))
    table = ["--data-path", tmp_path / "t.csv", "--csv-columns", "file", "label", "s", "--split", "test"]
    run("--model-path", tmp_path / "a.pth", *table, "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 4


@pytest.mark.slow
def test_several_processes_count_every_image_once(tmp_path):
    save(tmp_path / "a.pth", args={"data_set": "DIGITS"})
    words = f"{infer.__file__} --model-path {tmp_path}/a.pth --num-workers 0 --batch-size 7 --device cpu".split()
    found = []
    for processes in (1, 2):
        job = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        output = tmp_path / f"{processes}.json"
        command = [sys.executable, "-m", *job, *words, "--output", str(output)]
        assert subprocess.run(command, capture_output=True, text=True).stdout.count("acc@1") == 1
        found.append(json.loads(output.read_text()))
    assert found[1]["processes"] == 2
    for count in ("images", "correct1", "correct5", "mean_per_class"):
        assert found[0][count] == found[1][count]


def test_prediction_as_json_table_and_lines_says_the_same(tmp_path, capsys):
    folder = photographs(tmp_path / "photographs")
    model = save(tmp_path / "a.pth", classes=("temple", "plant", "other"))
    words = ["--model-path", tmp_path / "a.pth", "--image", folder, "--topk", "2"]
    for suffix in ("json", "csv", "parquet"):
        run(*words, "--output", tmp_path / f"out.{suffix}", *(["--quiet"] if suffix != "json" else []))
    records = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert [record["image"] for record in records] == [str(folder / "china.jpg"), str(folder / "flower.jpg")]
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [{key: str(value) for key, value in row.items()} for row in table] == rows
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    transform = load_checkpoint(tmp_path / "a.pth").transform
    for record, row, line in zip(records, rows, lines, strict=True):
        with torch.no_grad(), Image.open(record["image"]) as image:
            expected = model(transform(image)[None]).softmax(1)[0].topk(2)
        for rank, entry in enumerate(record["classes"]):
            assert entry["index"] == expected.indices[rank]
            assert entry["probability"] == pytest.approx(float(expected.values[rank]), abs=1e-5)
            assert row[f"class_{rank + 1}"] == entry["class"] and f"{entry['class']} " in line
            assert float(row[f"probability_{rank + 1}"]) == entry["probability"]
    with pytest.raises(UserError, match="out.txt: the file name must end in .json or .csv"):
        run(*words, "--output", tmp_path / "out.txt")


@pytest.mark.parametrize("tta", [[], ["--tta"]], ids=str)
def test_embeddings_are_what_the_classifier_reads(tmp_path, tta):
    folder = photographs(tmp_path / "photographs")
    model = save(tmp_path / "a.pth")
    words = ["--model-path", tmp_path / "a.pth", "--image", folder, "--batch-size=1", *tta]
    run(*words, "--embeddings", tmp_path / "e.npy")
    files = (tmp_path / "e.txt").read_text().splitlines()
    transform = load_checkpoint(tmp_path / "a.pth").transform
    with torch.no_grad():
        features = model.forward_features(torch.stack([transform(Image.open(file)) for file in files]))
        expected = model.forward_head(features, pre_logits=True)
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), expected, atol=1e-5)
    assert files == [str(folder / "china.jpg"), str(folder / "flower.jpg")]


def test_a_folder_is_predicted_without_its_hidden_files_and_past_unreadable_ones(tmp_path, capsys):
    folder = photographs(tmp_path / "photographs")
    (folder / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (40, 40)).save(folder / ".ipynb_checkpoints/a.png")
    (folder / "._china.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "broken.jpg").write_bytes((folder / "china.jpg").read_bytes()[:600])
    save(tmp_path / "a.pth")
    words = ["--model-path", tmp_path / "a.pth", "--image", folder, "--output", tmp_path / "o.json"]
    with pytest.raises(UserError, match="1 of 3 images could not be read") as error:
        run(*words, "--explain", tmp_path / "explained")
    assert error.value.exit_code == 2
    names = [Path(record["image"]).stem for record in json.loads((tmp_path / "o.json").read_text())["predictions"]]
    assert names == ["china", "flower"] and len(list((tmp_path / "explained").iterdir())) == 2
    assert "broken.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error", "named"),
    [
        (["--image", "missing.png"], UserError, "missing.png"),
        (["--image", "a.pth"], UserError, "1 of 1 images could not be read"),
        (["--explain"], UserError, "--explain and --embeddings need --image"),
        (["--embeddings", "x.npy"], UserError, "--embeddings need --image"),
        (["--image", "good.png", "--data-set", "DIGITS"], UserError, "--image"),
        (["--image", "good.png", "--output", "nowhere/results.json"], UserError, "nowhere"),
        (["--image", "good.png", "--output", "/proc/results.json"], MachineError, "/proc"),
        (["--data-set", "DIGITS", "--output", "results.csv"], UserError, "results.csv: the file name must"),
        (["--data-set", "DIGITS", "--report", "a.pth"], UserError, "a.pth"),
        (["--data-set", "CIFAR10"], UserError, "--data-path"),
        (["--modle-kwargs", "a=1"], UserError, "--modle-kwargs"),
    ],
)
def test_bad_input_is_one_line_that_names_it(tmp_path, monkeypatch, words, error, named):
    monkeypatch.chdir(tmp_path)
    save("a.pth")
    Image.new("RGB", (40, 40)).save("good.png")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=named) as caught:
        infer.main(["--model-path", "a.pth", "--device", "cpu", *words])
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_images_are_turned_upright_and_the_true_class_is_named_where_their_folder_is_a_class(tmp_path, capsys):
    save(tmp_path / "a.pth", classes=("cat", "dog"))
    photograph, exif = Image.fromarray(load_sample_images().images[0]), Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    for folder in ("dog", "holiday"):
        (tmp_path / folder).mkdir()
    photograph.save(tmp_path / "dog/upright.png")
    photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "holiday/turned.png", exif=exif)
    images = [tmp_path / "dog", tmp_path / "holiday"]
    run("--model-path", tmp_path / "a.pth", "--image", *images, "--output", tmp_path / "out.json")
    known, unknown = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert known["classes"] == unknown["classes"]
    assert known["true"] == {"index": 1, "class": "dog"} and "true" not in unknown
    assert [line.endswith("(true: dog)") for line in capsys.readouterr().out.splitlines()] == [True, False]


@pytest.mark.parametrize("size", [(56, 56), (32, 64)])
def test_the_explanation_marks_where_the_evidence_is(size):
    torch.manual_seed(0)
    image = torch.randn(3, *size)
    height, width = size
    image[:, height // 2 :, : width // 2] += 4

    def lower_left_is_bright(images):
        place = images[:, :, height // 2 :, : width // 2].mean((1, 2, 3))
        return torch.stack([-place, place, torch.zeros_like(place)], 1)

    heat = explanations.class_evidence(lower_left_is_bright, image, 1, batch_size=7)
    rows, columns = heat.shape
    inside = heat[rows // 2 :, : columns // 2]
    assert heat.max() == 1 and inside.max() == 1 and heat.min() >= 0
    assert inside.sum() > 0.7 * heat.sum()
    assert heat[: rows // 2 - explanations.HIDDEN + 1].eq(0).all()  # squares that touch these rows hide no evidence
    assert explanations.class_evidence(lower_left_is_bright, image, 0, batch_size=7).eq(0).all()  # evidence against


@pytest.mark.slow
def test_overlays_are_written_and_replace_no_other_overlay(tmp_path):
    folder, explained = photographs(tmp_path / "photographs"), tmp_path / "explained"
    save(tmp_path / "a.pth")
    words = ["--model-path", tmp_path / "a.pth", "--explain", explained, "--image"]
    run(*words, folder)
    names = ["china_explained.png", "flower_explained.png"]
    assert sorted(path.name for path in explained.iterdir()) == names
    before = {path: path.read_bytes() for path in explained.iterdir()}
    Image.new("RGB", (8, 8)).save(tmp_path / "china.png")
    with pytest.raises(UserError, match="share the file china_explained.png"):
        run(*words, folder, tmp_path / "china.png")
    assert all(path.read_bytes() == content for path, content in before.items())
