"""Data sets in their formats on disk, transforms, and the loaders that the command line builds."""

import argparse
import io
import itertools
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from timm.data import auto_augment, create_transform, random_erasing
from torchvision import datasets as vision
from torchvision import transforms
from torchvision.datasets import ImageFolder

from inputs.catalogue import build_dataset
from inputs.data import build_data
from inputs.transforms import RandomErasing, eval_transform, train_transform
from runtime.processes import Distributed
from training.classification_flags import FLAGS
from training.options import parse_args
from utils import UserError, seeded

ARGUMENTS = parse_args(FLAGS, ["--input-size", "32", "--batch-size", "4", "--num-workers", "0", "--reprob", "0"])


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**(vars(ARGUMENTS) | {"repeated_aug": False} | changes))


def colour(number: int) -> tuple[int, int, int]:
    return (10 * number % 256, 100, 200)


def save_image(path, number: int, size=(12, 10)) -> None:
    """Save an image of one colour, by which the tests recognise it (JPEG changes it slightly)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(number)).save(path)


def number_of(image: Image.Image) -> int:
    return round(image.getpixel((0, 0))[0] / 10)


def samples(dataset) -> list[tuple[int, int]]:
    """Check what every data set guarantees, and return (number, label) of all images."""
    found = []
    for index in range(len(dataset)):
        image, label = dataset.load(index)
        assert image.mode == "RGB"
        assert label == dataset.labels[index]
        assert isinstance(dataset.path(index), str)
        found.append((number_of(image), label))
    assert max(dataset.labels) < len(dataset.class_names)
    return found


def make_tree(root, classes=("cat", "dog"), splits=("train", "val"), images=2):
    numbers = itertools.cycle(range(25))
    for split in splits:
        for name in classes:
            for i in range(images):
                save_image(root / split / name / f"{i}.png", next(numbers))
    return root


# ----------------------------------------------------------------------------------------------------- digits


def test_digits_are_split_once_and_for_all():
    train, val = build_dataset("DIGITS", None, "train"), build_dataset("DIGITS", None, "val")
    assert (len(train), len(val)) == (1437, 360)
    assert np.bincount(val.labels).min() >= 34
    seen = [np.asarray(part.load(i)[0])[..., 0].tobytes() for part in (train, val) for i in range(len(part))]
    everything = [np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images]
    assert sorted(seen) == sorted(everything)
    assert [everything.index(image) for image in seen[1437:1447]] == PINNED
    assert val.class_names == tuple("0123456789")


PINNED = [21, 24, 28, 34, 35, 37, 39, 42, 45, 51]  # scikit-learn's numbers of the first validation digits


def test_digits_are_never_mirrored_and_always_whole():
    glyph = Image.fromarray(np.repeat(np.uint8([[255] * 4 + [0] * 4] * 8)[..., None], 3, axis=2))
    for size in (32, 64):
        transform = train_transform(size, color_jitter=0, glyphs=True)
        for key in range(20):
            with seeded(key):
                image = transform(glyph).float()
            assert image[..., : size // 4].mean() < 256 and image.shape == (3, size, size)
            middle = image[:, size // 2]
            assert middle[:, size // 2 - size // 4].mean() > 200 and middle[:, -size // 4].mean() < 50


# ---------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["FOLDER", "IMNET"])
@pytest.mark.parametrize("val", ["val", "validation", "test"])
def test_folder_trees(tmp_path, name, val):
    make_tree(tmp_path, ("n01440764", "n02084071"), ("train", val))
    (tmp_path / "train" / "n01440764" / "notes.txt").write_text("not an image")
    train, held_out = build_dataset(name, tmp_path, "train"), build_dataset(name, str(tmp_path), "val")
    assert samples(train) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert samples(held_out) == [(4, 0), (5, 0), (6, 1), (7, 1)]
    assert train.class_names == held_out.class_names == ("n01440764", "n02084071")
    assert train.path(2) == str(tmp_path / "train" / "n02084071" / "0.png")


def test_hidden_files_are_no_data_and_what_else_is_left_out_is_counted(tmp_path, capsys):
    make_tree(tmp_path)
    expected = samples(build_dataset("FOLDER", tmp_path, "train"))
    save_image(tmp_path / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png", 9)
    for name in (".ipynb_checkpoints", ".thumbnails"):
        save_image(tmp_path / "train" / name / "0.png", 9)
    shutil.copyfile(tmp_path / "train" / "cat" / "0.png", tmp_path / "train" / "cat" / "._0.png")
    for name in ("notes.txt", "Thumbs.db"):
        (tmp_path / "train" / "dog" / name).write_text("no image")
    build_data(arguments(data_set="FOLDER", data_path=tmp_path), Distributed())
    assert samples(build_dataset("FOLDER", tmp_path, "train")) == expected
    dog = tmp_path / "train" / "dog"
    for number, suffix in enumerate(("jfif", "gif", "BMP", "tif", "webp", "jp2", "tga"), 10):
        kind = {"jfif": "jpeg"}.get(suffix)
        Image.new("RGB", (12, 10), colour(number)).save(dog / f"{number}.{suffix}", kind)
    numbers = [number for number, _ in samples(build_dataset("FOLDER", tmp_path, "train"))]
    assert sorted(numbers) == [0, 1, 2, 3, *range(10, 17)]
    assert capsys.readouterr().err == f"2 files left out, the first {dog}/Thumbs.db (not an image file name)\n"


def test_test_is_validated_on_only_where_there_is_no_val_and_is_a_split_of_its_own(tmp_path):
    make_tree(tmp_path, splits=("test",))
    with pytest.raises(UserError, match=f"{tmp_path}.*expected a folder train"):
        build_dataset("FOLDER", tmp_path, "train")
    make_tree(tmp_path, splits=("train", "test"))
    numbers = [number for number, _ in samples(build_dataset("FOLDER", tmp_path, "test"))]
    assert numbers == [number for number, _ in samples(build_dataset("FOLDER", tmp_path, "val"))] == [4, 5, 6, 7]
    make_tree(tmp_path, splits=("val",))
    assert [number for number, _ in samples(build_dataset("FOLDER", tmp_path, "val"))] == [0, 1, 2, 3]
    assert [number for number, _ in samples(build_dataset("FOLDER", tmp_path, "test"))] == numbers
    with pytest.raises(UserError, match="--split test: --data-set DIGITS does not support it"):
        build_dataset("DIGITS", None, "test")


@pytest.mark.parametrize("splits", [("train",), ("",)], ids=["train", "no split"])
def test_a_folder_without_validation_is_split_by_a_seed_of_its_own(tmp_path, splits):
    make_tree(tmp_path, ("ant", "bee"), splits, images=10)
    found = {}
    for seed in (0, 0, 1):
        train, val = (build_dataset("FOLDER", tmp_path, part, val_split=(0.3, seed)) for part in ("train", "val"))
        assert [np.bincount(part.labels).tolist() for part in (train, val)] == [[7, 7], [3, 3]]
        paths = [{part.path(i) for i in range(len(part))} for part in (train, val)]
        assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 20
        assert found.setdefault(seed, paths[1]) == paths[1]
    assert found[0] != found[1]
    for part, share in (("val", 1e-3), ("train", 0.999)):
        assert len(build_dataset("FOLDER", tmp_path, part, val_split=(share, 0))) == 2


def test_a_part_of_each_class_is_trained_on_and_all_is_validated_on(tmp_path):
    make_tree(tmp_path, ("ant", "bee"), images=10)
    found = {}
    for train_part, seed in (((0.3, 0), 0), ((0.3, 0), 5), ((0.3, 1), 0), ((1.0, 0), 0)):
        args = arguments(data_set="FOLDER", data_path=tmp_path, batch_size=2, train_part=train_part, seed=seed)
        train, val = (loader.dataset for loader in build_data(args, Distributed()))
        assert np.bincount(train.labels).tolist() == [10 * train_part[0]] * 2 and len(val) == 20
        paths = {train.path(i) for i in range(len(train))}
        assert found.setdefault(train_part, paths) == paths
    assert found[0.3, 0] != found[0.3, 1]


def test_folders_that_do_not_fit_are_refused(tmp_path):
    make_tree(tmp_path / "both")
    with pytest.raises(UserError, match="--val-split: .*val exists and is used for validation; remove the flag"):
        build_dataset("FOLDER", tmp_path / "both", "train", val_split=(0.5, 0))
    make_tree(tmp_path / "single", ("ant", "bee"), ("train",), images=1)
    with pytest.raises(UserError, match="--val-split: class ant has a single image"):
        build_dataset("FOLDER", tmp_path / "single", "train", val_split=(0.5, 0))
    save_image(tmp_path / "both" / "train" / "zebra" / "0.png", 0)
    with pytest.raises(UserError, match="classes in only one of training and validation: zebra"):
        build_data(arguments(data_set="FOLDER", data_path=tmp_path / "both"), Distributed())
    (tmp_path / "single" / "train" / "cow").mkdir()
    with pytest.raises(UserError, match="no images in the folder of class cow"):
        build_dataset("FOLDER", tmp_path / "single", "train")
    with pytest.raises(UserError, match="--val-split: --data-set DIGITS does not support it"):
        build_dataset("DIGITS", None, "train", val_split=(0.5, 0))


def test_images_come_in_torchvisions_order_also_through_links(tmp_path):
    make_tree(tmp_path, ("ant", "bee"), images=3)
    save_image(tmp_path / "train" / "ant" / "nest" / "deep" / "0.png", 20)
    save_image(tmp_path / "train" / "ant" / "b.JPG", 21)
    save_image(tmp_path / "elsewhere" / "7.png", 22)
    (tmp_path / "train" / "ant" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "bee" / "again.png").symlink_to("0.png")
    expected = ImageFolder(str(tmp_path / "train")).samples
    (tmp_path / "train" / "ant" / "nest" / "loop").symlink_to("..")
    found = build_dataset("FOLDER", tmp_path, "train")
    assert [(found.path(i), int(found.labels[i])) for i in range(len(found))] == expected
    assert len(expected) == 3 + 3 + 4


@pytest.mark.parametrize(
    ("name", "root", "options", "message"),
    [
        ("IMGNET", ".", {}, "--data-set IMGNET: unknown; choose one of DIGITS, CIFAR10"),
        ("IMNET", None, {}, "needs --data-path, the folder of its files"),
        ("IMNET", "nowhere", {}, "--data-path nowhere: no such file or folder"),
        ("IMNET", ".", {"download": True}, "--download: --data-set IMNET does not support it"),
        ("DIGITS", None, {"classes": ["1", "ten"]}, "--classes ten: no such class; there are 10: 0, 1"),
        ("DIGITS", None, {"classes": ["1", "10"]}, "--classes 10: no such class"),
        ("DIGITS", None, {"classes": ["1", "2", "1"]}, "named twice"),
    ],
)
def test_mistakes_in_naming_a_data_set_get_one_line(name, root, options, message):
    with pytest.raises(UserError, match=message) as caught:
        build_dataset(name, root, "train", **options)
    assert "\n" not in str(caught.value)


def test_some_classes_of_a_data_set_are_renumbered_as_given(tmp_path):
    make_tree(tmp_path, ("ant", "bee", "cat"))
    whole = build_dataset("FOLDER", tmp_path, "val")
    for classes in (["cat", "ant"], ["2", "0"], ["cat", "0"]):
        subset = build_dataset("FOLDER", tmp_path, "val", classes=classes)
        assert subset.class_names == ("cat", "ant")
        assert samples(subset) == [(6, 1), (7, 1), (10, 0), (11, 0)]
        assert [subset.path(i) for i in range(4)] == [whole.path(i) for i in (0, 1, 4, 5)]


# ----------------------------------------------------------------------------------------- sets with a format


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, monkeypatch, name):
    builder = {"CIFAR10": vision.CIFAR10, "CIFAR100": vision.CIFAR100}[name]
    folder = tmp_path / builder.base_folder
    folder.mkdir()
    names = [f"class {i}" for i in range(10)]
    files = [file for file, _ in builder.train_list + builder.test_list]
    for number, file in enumerate(files):
        pixels = np.zeros((2, 3, 32, 32), dtype=np.uint8)
        pixels[:, 0] = 10 * number
        labels = {"labels" if name == "CIFAR10" else "fine_labels": [number, 9]}
        (folder / file).write_bytes(pickle.dumps({"data": pixels.reshape(2, -1)} | labels))
    (folder / builder.meta["filename"]).write_bytes(pickle.dumps({builder.meta["key"]: names}))
    monkeypatch.setattr(builder, "train_list", [[file, None] for file in files[:-1]])
    monkeypatch.setattr(builder, "test_list", [[files[-1], None]])
    monkeypatch.setattr(builder, "meta", builder.meta | {"md5": None})
    for root in (tmp_path, folder):
        train, test = build_dataset(name, root, "train"), build_dataset(name, root, "val")
        assert samples(train) == [pair for i in range(len(files) - 1) for pair in ((i, i), (i, 9))]
        assert samples(test) == [(len(files) - 1, len(files) - 1), (len(files) - 1, 9)]
        assert train.class_names == tuple(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CIFAR10", "cifar-10-batches-py"),
        ("CIFAR100", "cifar-100-python"),
        ("FLOWERS", "flowers-102.*setid.mat"),
        ("PETS", "oxford-iiit-pet.*images"),
        ("CARS", "stanford_cars.*cars_train_annos.mat.*cars_test_annos_withlabels.mat"),
    ],
)
def test_missing_files_are_named_with_the_way_to_get_them(tmp_path, name, expected):
    with pytest.raises(UserError, match=expected + ".*--download" * (name != "CARS")):
        build_dataset(name, tmp_path, "train")


def test_flowers_as_torchvision_lays_them_out(tmp_path, monkeypatch):
    folder = tmp_path / "flowers-102"
    for number in range(1, 7):
        save_image(folder / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 4, 5, 102]])})
    savemat(folder / "setid.mat", {"trnid": [[5, 1]], "valid": [[2, 4]], "tstid": [[3, 6]]})
    unchecked = {key: (file, None) for key, (file, _) in vision.Flowers102._file_dict.items()}
    monkeypatch.setattr(vision.Flowers102, "_file_dict", unchecked)
    train, test = build_dataset("FLOWERS", tmp_path, "train"), build_dataset("FLOWERS", folder, "val")
    assert samples(train) == [(5, 4), (1, 0), (2, 1), (4, 3)]
    assert samples(test) == [(3, 2), (6, 101)]
    assert len(train.class_names) == 102 and train.class_names[0] == "pink primrose"


def test_flowers_in_class_folders(tmp_path):
    make_tree(tmp_path, ("1", "10", "2"), ("train", "test"), images=1)
    assert samples(build_dataset("FLOWERS", tmp_path, "train")) == [(0, 0), (1, 1), (2, 2)]
    assert samples(build_dataset("FLOWERS", tmp_path, "val")) == [(3, 0), (4, 1), (5, 2)]


def test_cars_with_the_devkit(tmp_path):
    folder = tmp_path / "stanford_cars"
    row = [("bbox_x1", int), ("class", int), ("fname", object)]
    for split, file, numbers in (
        ("train", "devkit/cars_train_annos.mat", (1, 2)),
        ("test", "cars_test_annos_withlabels.mat", (3, 4)),
    ):
        (folder / "devkit").mkdir(parents=True, exist_ok=True)
        for number in numbers:
            save_image(folder / f"cars_{split}" / f"{number:05d}.jpg", number)
        rows = np.array([(0, number - numbers[0] + 1, f"{number:05d}.jpg") for number in numbers], dtype=row)
        savemat(folder / file, {"annotations": rows})
    class_names = np.array(["Audi S4", "BMW M3"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": class_names})
    for root in (tmp_path, folder):
        train, test = build_dataset("CARS", root, "train"), build_dataset("CARS", root, "val")
        assert samples(train) == [(1, 0), (2, 1)] and samples(test) == [(3, 0), (4, 1)]
        assert train.class_names == ("Audi S4", "BMW M3")


CAR_ANNOTATIONS = {
    "splits": {"train": [("1.jpg", 1), ("2.jpg", 3)], "test": [("3.jpg", 2)]},
    "splits from 0": {"train": [["1.jpg", 0], ["2.jpg", 2]], "test": [["3.jpg", 1]]},
    "boxes and flags": [("1.jpg", 1, 5, 6, False), ("2.jpg", 3, 5, 6, False), ("3.jpg", 2, 5, 6, True)],
}


@pytest.mark.parametrize("annotations", CAR_ANNOTATIONS.values(), ids=CAR_ANNOTATIONS)
@pytest.mark.parametrize("prefix", ["", "cars_"])
def test_cars_in_folders_with_a_pickle(tmp_path, annotations, prefix):
    for number, split in ((1, "train"), (2, "train"), (3, "test")):
        save_image(tmp_path / f"{prefix}{split}" / f"{number}.jpg", number)
    (tmp_path / "cars_anno.pkl").write_bytes(pickle.dumps(annotations))
    train, test = build_dataset("CARS", tmp_path, "train"), build_dataset("CARS", tmp_path, "val")
    assert samples(train) == [(1, 0), (2, 2)] and samples(test) == [(3, 1)]
    assert len(train.class_names) == len(test.class_names) == 3


class Hostile:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"train": [Hostile()], "test": []}),
        b"garbage",
        pickle.dumps({"train": [("1.jpg", 1)]}),
    ],
)
def test_the_cars_pickle_executes_nothing_and_is_refused_by_name(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cars_anno.pkl").write_bytes(content)
    with pytest.raises(UserError, match="cars_anno.pkl") as caught:
        build_dataset("CARS", tmp_path, "train")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_pets(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    for number, name in enumerate(("Abyssinian_1", "great_pyrenees_2", "Abyssinian_3", "great_pyrenees_4")):
        save_image(folder / "images" / f"{name}.jpg", number)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\ngreat_pyrenees_2 2 2 1\n")
    (folder / "annotations" / "test.txt").write_text("great_pyrenees_4 2 2 1\nAbyssinian_3 1 1 1\n")
    train, test = build_dataset("PETS", tmp_path, "train"), build_dataset("PETS", folder, "val")
    assert samples(train) == [(0, 0), (1, 1)] and samples(test) == [(3, 1), (2, 0)]
    assert train.class_names == test.class_names == ("Abyssinian", "Great Pyrenees")


def make_inat(root, year: int, with_supercategory: bool) -> None:
    ranks = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus")
    taxa = [("Plantae", "oak"), ("Animalia", "wren"), ("Animalia", "ant")]
    (root / "categories.json").write_text(
        json.dumps([{"id": i, "name": name} | dict.fromkeys(ranks, kingdom) for i, (kingdom, name) in enumerate(taxa)])
    )
    for split, numbers in (("train", (0, 1, 2, 3)), ("val", (4, 5))):
        categories = {number: (2, 0, 1)[number % 3] for number in numbers}
        images = []
        for number, category in categories.items():
            parts = [f"train_val{year}", taxa[category][0], str(category), f"{number}.png"]
            images.append({"id": 100 + number, "file_name": "/".join(parts)})
            save_image(root.joinpath(*(parts if with_supercategory else [parts[0], *parts[2:]])), number)
        annotations = [{"image_id": 100 + number, "category_id": category} for number, category in categories.items()]
        (root / f"{split}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize("with_supercategory", [True, False])
def test_inaturalist(tmp_path, name, year, with_supercategory):
    make_inat(tmp_path, year, with_supercategory)
    train, val = build_dataset(name, tmp_path, "train"), build_dataset(name, tmp_path, "val")
    assert train.class_names == val.class_names == ("ant", "oak", "wren")  # as they come in train{year}.json
    assert samples(train) == [(0, 0), (1, 1), (2, 2), (3, 0)]
    assert samples(val) == [(4, 1), (5, 2)]
    kingdoms = build_dataset(name, tmp_path, "train", inat_category="kingdom")
    assert kingdoms.class_names == ("Animalia", "Plantae")
    assert samples(kingdoms) == [(0, 0), (1, 1), (2, 0), (3, 0)]


def test_mistakes_with_inaturalist_are_named(tmp_path):
    with pytest.raises(UserError, match="No such file.*categories.json"):
        build_dataset("INAT", tmp_path, "train")
    make_inat(tmp_path, 2019, True)
    with pytest.raises(UserError, match="one is incomplete .*species"):
        build_dataset("INAT19", tmp_path, "train", inat_category="species")
    with pytest.raises(UserError, match="train2018.json"):
        build_dataset("INAT", tmp_path, "train")
    (tmp_path / "val2019.json").write_text('{"images": [')
    with pytest.raises(UserError, match="expected .*val2019.json, but one is incomplete .*JSONDecodeError"):
        build_dataset("INAT19", tmp_path, "val")


# ---------------------------------------------------------------------------------------------------- sharded


def write_shard(path, entries) -> None:
    """entries: (key, number of the image, label)."""
    with tarfile.open(path, "w") as tar:
        for key, number, label in entries:
            image = io.BytesIO()
            Image.new("RGB", (12, 10), colour(number)).save(image, "png")
            for suffix, content in (("png", image.getvalue()), ("json", b"{}"), ("cls", f"{label}\n".encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_tar_shards_are_read_by_position(tmp_path):
    write_shard(tmp_path / "birds-train-0000.tar", [("a/1", 1, 0), ("a/2", 2, 2)])
    write_shard(tmp_path / "birds-train-0001.tar", [("b/1", 3, 1)])
    write_shard(tmp_path / "birds-validation-0000.tar", [("c/1", 4, 3)])
    train, val = build_dataset("wds/birds", tmp_path, "train"), build_dataset("wds/birds", tmp_path, "val")
    assert samples(train) == [(1, 0), (2, 2), (3, 1)] and samples(val) == [(4, 3)]
    assert train.class_names == val.class_names == ("0", "1", "2", "3")
    assert train.path(1) == f"{tmp_path}/birds-train-0000.tar/a/2.png"


@pytest.mark.parametrize("label", ["1.7", "-1", "", "one"])
def test_a_shards_label_that_is_no_class_number_is_named(tmp_path, label):
    write_shard(tmp_path / "train-0.tar", [("a/1", 1, 0), ("a/2", 2, label)])
    message = f"{tmp_path}/train-0.tar: not a readable shard: a/2.cls: .* is not a class number"
    with pytest.raises(UserError, match=message) as caught:
        build_dataset("wds/", tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_shards_lose_no_sample_without_a_word(tmp_path):
    """Names with dots, formats other than JPEG, duplicates, files without a partner, macOS's own files."""
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        for number, (key, suffix) in enumerate([("scan_1.0", "png"), ("scan_1.5", "PNG"), ("b/3", "bmp")]):
            image = io.BytesIO()
            Image.new("RGB", (12, 10), colour(number)).save(image, suffix)
            add(f"{key}.{suffix}", image.getvalue())
            add(f"._{key}.{suffix}", b"not an image")
            add(f"{key}.cls", str(number).encode())
        add("b/3.png", image.getvalue())
        add("lonely.cls", b"1")
        add("unlabelled.jpg", image.getvalue())
    found = build_dataset("wds/", tmp_path, "train")
    assert samples(found) == [(0, 0), (1, 1), (2, 2)]
    assert [reason.partition(" (")[2] for reason in found.left_out] == [
        "a second file of its sample)",
        "no image or no .cls file of its sample)",
        "no image or no .cls file of its sample)",
    ]


def test_missing_and_damaged_shards_are_named(tmp_path):
    with pytest.raises(UserError, match=r"expected shards birds-train\*.tar"):
        build_dataset("wds/birds", tmp_path, "train")
    with tarfile.open(tmp_path / "cats-train-0.tar", "w") as tar:
        for name in ("1.png", "1.json"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(UserError, match=r"contains no images; .*/1.png \(no image or no .cls file of its sample\)"):
        build_dataset("wds/cats", tmp_path, "train")
    (tmp_path / "train-0.tar").write_bytes(b"no shard" * 100)
    with pytest.raises(UserError, match="train-0.tar: not a readable shard"):
        build_dataset("wds/", tmp_path, "train")


# ------------------------------------------------------------------------------------------------- transforms


def photo(size=(97, 61)) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre():
    for size, crop_pct, resized in ((224, 0.875, 256), ((48, 48), 0.875, 54), (224, 0.96, 233)):
        resize = transforms.Resize(resized, transforms.InterpolationMode.BICUBIC)
        expected = transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])
        assert torch.equal(eval_transform(size, crop_pct=crop_pct)(photo()), expected(photo()))


def test_small_images_are_cropped_with_padding_and_not_rescaled():
    # DeiT's rule for CIFAR at its own size: the pixels stay as they are.
    original = photo((32, 32))
    transform = train_transform(32, color_jitter=0)
    for key in range(5):
        with seeded(key):
            image = transform(original).permute(1, 2, 0).numpy()
        padded = np.pad(np.asarray(original), ((4, 4), (4, 4), (0, 0)))
        windows = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert any(np.array_equal(seen, window) for window in windows for seen in (image, image[:, ::-1]))


def test_the_strongest_posterize_of_randaugment_works():
    op = auto_augment.AugmentOp("PosterizeIncreasing", prob=1, magnitude=10, hparams={})
    assert np.asarray(op(photo())).max() == 0


def test_images_normalised_on_the_device_are_those_of_timms_transform():
    _, val = build_data(arguments(), Distributed())
    batch = next(iter(val))
    transform = create_transform(32, crop_pct=1.0, interpolation="bicubic")
    expected = torch.stack([transform(val.dataset.load(int(index))[0]) for index in batch.indices])
    torch.testing.assert_close(batch.images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("count", [1, 3])
def test_erasing_is_timms(mode, count):
    ours = RandomErasing(0.7, mode, count)
    theirs = random_erasing.RandomErasing(0.7, mode=mode, min_count=count, device="cpu")
    shares = []
    for erase in (lambda image: ours.erase(image[None], ours.draw(40, 60)[None])[0], theirs):
        with seeded("erasing"):
            images = torch.stack([erase(torch.full((3, 40, 60), 9.0)) for _ in range(300)])
        erased = images != 9
        shares.append((erased.float().mean(), erased.flatten(1).any(1).float().mean()))
        values = images[erased]
        if mode == "const":
            assert (values == 0).all()
        else:
            assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1
    assert torch.allclose(*map(torch.tensor, shares), atol=0.06), shares


# ------------------------------------------------------------------------------------- from the command line


def test_the_flags_make_loaders_that_know_their_data():
    train, val = build_data(arguments(batch_size=100, classes=["3", "5", "7"]), Distributed())
    assert train.dataset.class_names == val.dataset.class_names == ("3", "5", "7")
    assert len(train) == len(train.dataset) // 100
    batch = next(train.epoch(0))
    assert batch.images.shape == (100, 3, 32, 32) and batch.images.dtype == torch.float32
    assert batch.targets.dtype == torch.int64
    assert batch.targets.tolist() == train.dataset.labels[batch.indices].tolist()
    assert sum(len(batch.targets) for batch in val) == len(val.dataset)


def test_a_training_set_smaller_than_an_update_is_refused_with_both_numbers():
    numbers = r"takes 2000 images \(--batch-size 500 x 2 processes x --accum-iter 2\) .* has 1437"
    with pytest.raises(UserError, match=numbers):
        build_data(arguments(batch_size=500, accum_iter=2), Distributed(world_size=2))


def test_token_label_maps_come_with_their_images(tmp_path):
    make_tree(tmp_path / "images")
    maps = tmp_path / "maps"
    for name in ("cat", "dog"):
        (maps / name).mkdir(parents=True)
        for i in range(2):
            label_map = torch.zeros(2, 5, 18, 18)
            label_map[0] = 10 * ("cat", "dog").index(name) + i
            torch.save(label_map.half(), maps / name / f"{i}.pt")
    args = arguments(data_set="FOLDER", data_path=tmp_path / "images", token_label_data=str(maps))
    train, _ = build_data(args, Distributed())
    batch = next(train.epoch(0))
    assert batch.targets["values"].shape == (4, 5, 18, 18)
    labels, values = batch.targets["label"], batch.targets["values"]
    for index, label, value in zip(batch.indices, labels, values, strict=True):
        assert value.unique().tolist() == [10 * int(label) + int(index) % 2]


def test_classes_of_imagenet_are_chosen_by_their_words_too(tmp_path):
    ids = ("n01440764", "n02102040", "n02012849", "n03126707")  # tench, English springer, crane (bird), crane (machine)
    for split in ("train", "val"):
        for name in ids:
            save_image(tmp_path / split / name / "0.png", 0)
    chosen = build_dataset("FOLDER", tmp_path, "val", classes=["english springer", "Tinca tinca", "n03126707"])
    assert chosen.class_names == ("n02102040", "n01440764", "n03126707")
    for name in ("crane", "dog"):
        with pytest.raises(UserError, match=f"--classes {name}: no such class; there are 4: n01440764 tench"):
            build_dataset("FOLDER", tmp_path, "val", classes=[name])
