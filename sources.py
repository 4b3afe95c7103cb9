"""The data sets: where their images and labels lie, and how an image is decoded.

A data set here is an object with ``load(index) -> (RGB image, label)``, ``path(index) -> str``, ``labels``,
``class_names`` and a length (`ImageDataset`). `DATASETS` says how each one is built.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import io
import json
import os
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

import numpy as np
from PIL import Image, ImageOps
from timm.data import create_dataset
from torchvision import datasets as vision

from utils import UserError, one_line

TRAIN_FOLDERS = ("train",)
VAL_FOLDERS = ("val", "validation", "valid", "test")
MAX_ANNOTATION_BYTES = 64 * 2**20


# ----------------------------------------------------------------------------------------------------- images


class BadImage(UserError):
    """An image that cannot be read; the message names the file and the reason."""


def read_image(source: str | BinaryIO, name: str | None = None, upright: bool = False) -> Image.Image:
    """Decode an image file to 8-bit RGB: the pixels that torchvision's and timm's loaders give.

    The content decides the format, not the file's extension. Alpha is dropped; 16-bit grey is scaled to 8
    bits (Pillow's own conversion, and hence those loaders, would clip it).

    Args:
        source: a path or an open binary file.
        name: what messages call it, the path by default.
        upright: turn the image as its EXIF orientation says. Data sets leave it as stored: the published
            accuracies and label maps were made that way. A photograph to be classified should be upright.

    Raises:
        BadImage: not an image, truncated, empty, of more pixels than Pillow's limit on decompression bombs,
            or of a kind without a defined range (32-bit integers, floats).
    """
    name = str(source) if name is None else name
    try:
        with Image.open(source) as image:
            if upright:
                image = ImageOps.exif_transpose(image)
            return _to_rgb(image)
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise BadImage(f"{name}: cannot be read as an image: {one_line(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16"):
        eight_bits = np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
        return Image.fromarray(eight_bits).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no fixed range; convert it to 8 bits")
    return image.convert("RGB")


# -------------------------------------------------------------------------------------------------- data sets


class ImageDataset(Protocol):
    """What the loaders and `infer.py` need of a data set."""

    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image as 8-bit RGB and its label; raises `BadImage`."""

    def path(self, index: int) -> str:
        """The image's file, or what names it best."""


class ImageFiles:
    """Images in files."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], class_names: Sequence[str]):
        # One block of bytes instead of a million strings: forked workers then share its memory.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.path(index)), int(self.labels[index])

    def path(self, index: int) -> str:
        return os.fsdecode(self._paths[index])


class ImageArrays:
    """Images in memory, (N, H, W) or (N, H, W, 3) of uint8."""

    def __init__(self, name: str, images: np.ndarray, labels: Sequence[int], class_names: Sequence[str]):
        self._name = name
        self._images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]).convert("RGB"), int(self.labels[index])

    def path(self, index: int) -> str:
        return f"{self._name}[{index}]"


class TarImages:
    """Images in tar shards (webdataset's layout) on a local disk, read by position."""

    def __init__(
        self,
        shards: Sequence[Path],
        members: Sequence[tuple[int, str, int, int]],
        labels: Sequence[int],
        class_names: Sequence[str],
    ):
        """members: (shard number, name, offset in bytes, size in bytes) of each image."""
        self._shards = [str(shard) for shard in shards]
        self._names = np.array([name.encode() for _, name, _, _ in members])
        self._places = np.array([(shard, offset, size) for shard, _, offset, size in members], dtype=np.int64)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> tuple[Image.Image, int]:
        shard, offset, size = self._places[index]
        try:
            with open(self._shards[shard], "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise BadImage(f"{self.path(index)}: {error.strerror}") from error
        return read_image(io.BytesIO(content), self.path(index)), int(self.labels[index])

    def path(self, index: int) -> str:
        return f"{self._shards[self._places[index, 0]]}/{self._names[index].decode()}"


class HuggingFaceImages:
    """A random-access Hugging Face data set, through timm's reader."""

    def __init__(self, name: str, reader):
        # The reader and not timm's data set around it, which replaces an image that it cannot
        # read by the next one.
        self._name = name
        self._reader = reader
        self.labels = np.asarray(reader.dataset[reader.label_key], dtype=np.int64)
        by_label = {label: class_name for class_name, label in reader.class_to_idx.items()}
        count = max(len(by_label), _count_classes(self.labels))
        self.class_names = tuple(by_label.get(i, str(i)) for i in range(count))

    def __len__(self) -> int:
        return len(self._reader)

    def load(self, index: int) -> tuple[Image.Image, int]:
        try:
            file, label = self._reader[index]
        except OSError as error:
            raise BadImage(f"{self.path(index)}: {one_line(error)}") from error
        with file:
            return read_image(file, self.path(index)), int(label)

    def path(self, index: int) -> str:
        return f"{self._name}[{index}]"


class ClassSubset:
    """The images of some classes of a data set, labelled 0, 1, … in the order of the classes given."""

    def __init__(self, dataset: ImageDataset, classes: Sequence[str]):
        """classes: names or numbers. Raises UserError for an unknown or a repeated one."""
        chosen = [_class_number(dataset.class_names, name) for name in classes]
        if len(set(chosen)) != len(chosen):
            raise UserError(f"--classes {','.join(classes)}: a class is named twice")
        new_label = np.full(len(dataset.class_names), -1)
        new_label[chosen] = range(len(chosen))
        self._dataset = dataset
        self._indices = np.flatnonzero(np.isin(dataset.labels, chosen))
        self.labels = new_label[dataset.labels[self._indices]]
        self.class_names = tuple(dataset.class_names[old] for old in chosen)

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self._dataset.load(int(self._indices[index]))[0], int(self.labels[index])

    def path(self, index: int) -> str:
        return self._dataset.path(int(self._indices[index]))


def _class_number(class_names: Sequence[str], name: str) -> int:
    if name in class_names:
        return class_names.index(name)
    if name.isdecimal() and int(name) < len(class_names):
        return int(name)
    shown = ", ".join(class_names[:10]) + (", …" if len(class_names) > 10 else "")
    raise UserError(f"--classes {name}: no such class; there are {len(class_names)}: {shown}")


def _count_classes(labels: np.ndarray) -> int:
    if labels.min(initial=0) < 0:
        raise UserError("some labels are negative: they are withheld in this split")
    return int(labels.max(initial=-1)) + 1


# --------------------------------------------------------------------------------------- where they come from


@dataclass(frozen=True)
class Request:
    """What a builder is asked for."""

    name: str
    root: Path
    train: bool
    download: bool
    inat_category: str

    @property
    def split(self) -> str:
        return "train" if self.train else "val"

    def missing(self, expected: str) -> UserError:
        return UserError(f"--data-set {self.name} --data-path {self.root}: expected {expected}")


def _digits(request: Request) -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits, 8×8: 1,437 to train on and 360 to validate, by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(np.arange(len(images)), test_size=360, random_state=0, stratify=digits.target)
    chosen = np.sort(split[0 if request.train else 1])
    return ImageArrays(
        f"DIGITS/{request.split}", images[chosen], digits.target[chosen], [str(name) for name in digits.target_names]
    )


def _cifar(request: Request) -> ImageDataset:
    builder = {"CIFAR10": vision.CIFAR10, "CIFAR100": vision.CIFAR100}[request.name]
    data = _from_torchvision(builder, request, train=request.train, download=request.download)
    return ImageArrays(f"{request.name}/{request.split}", data.data, data.targets, data.classes)


def _folder(request: Request) -> ImageDataset:
    """Any tree train/CLASS/IMAGE and val/CLASS/IMAGE; validation, valid and test are taken for val."""
    own, other = TRAIN_FOLDERS, VAL_FOLDERS
    if not request.train:
        own, other = other, own
    folder = _first_folder(request.root, own)
    if folder is None:
        raise request.missing(f"a folder {' or '.join(own)} with a folder of images for each class")
    return _image_folder(folder, _first_folder(request.root, other))


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _image_folder(folder: Path, other: Path | None) -> ImageDataset:
    """The images of `folder`, whose classes must be those of `other`, the folder of the other split."""
    classes = _class_folders(folder)
    if not classes:
        raise UserError(f"{folder}: no class folders in it")
    if other is not None and (difference := set(classes) ^ set(_class_folders(other))):
        named = ", ".join(sorted(difference)[:10])
        raise UserError(f"{folder} and {other} have to hold the same classes; only in one of them: {named}")
    found = vision.ImageFolder(str(folder), allow_empty=True)
    paths, labels = zip(*found.samples, strict=True) if found.samples else ((), ())
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=len(classes))
    if not counts.all():
        empty = ", ".join(classes[i] for i in np.flatnonzero(counts == 0)[:10])
        raise UserError(
            f"{folder}: no images in the folder of class {empty}; "
            f"files ending in {' '.join(vision.folder.IMG_EXTENSIONS)} count"
        )
    return ImageFiles(paths, labels, classes)


def _flowers(request: Request) -> ImageDataset:
    """Oxford 102 Flowers: torchvision's layout, or class folders in train/ and test/.

    Trained on train and val, 2,040 images, and validated on test, as the published transfers are.
    """
    if _first_folder(request.root, TRAIN_FOLDERS) or _first_folder(request.root, VAL_FOLDERS):
        return _folder(request)
    parts = [
        _from_torchvision(vision.Flowers102, request, split=split, download=request.download)
        for split in (("train", "val") if request.train else ("test",))
    ]
    paths = [str(path) for part in parts for path in part._image_files]
    labels = [label for part in parts for label in part._labels]
    return ImageFiles(paths, labels, vision.Flowers102.classes)


def _cars(request: Request) -> ImageDataset:
    """Stanford Cars: torchvision's layout with the devkit, or a folder with cars_anno.pkl."""
    if request.download:
        raise UserError(
            "--download: Stanford Cars is no longer offered for download; put its files into "
            f"{request.root}/stanford_cars: devkit/cars_meta.mat, devkit/cars_train_annos.mat, "
            "cars_test_annos_withlabels.mat, cars_train/*.jpg and cars_test/*.jpg"
        )
    if (request.root / "cars_anno.pkl").is_file():
        return _cars_with_pickle(request)
    data = _from_torchvision(vision.StanfordCars, request, split="train" if request.train else "test")
    paths, labels = zip(*data._samples, strict=True)
    return ImageFiles(paths, labels, data.classes)


def _pets(request: Request) -> ImageDataset:
    data = _from_torchvision(
        vision.OxfordIIITPet, request, split="trainval" if request.train else "test", download=request.download
    )
    return ImageFiles([str(path) for path in data._images], data._labels, data.classes)


# The folder that torchvision looks for below the root, and what has to be in it.
_LAYOUTS = {
    vision.CIFAR10: ("cifar-10-batches-py", "the Python version of CIFAR-10"),
    vision.CIFAR100: ("cifar-100-python", "the Python version of CIFAR-100"),
    vision.Flowers102: (
        "flowers-102",
        "jpg/*.jpg, imagelabels.mat and setid.mat (or, instead of it, class folders in train/ and test/)",
    ),
    vision.StanfordCars: (
        "stanford_cars",
        "devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_train/, "
        "cars_test_annos_withlabels.mat and cars_test/ (or, instead of "
        "it, cars_anno.pkl, train/ and test/)",
    ),
    vision.OxfordIIITPet: ("oxford-iiit-pet", "images/ and annotations/"),
}


def _from_torchvision(builder: type, request: Request, **options: str | bool) -> vision.VisionDataset:
    """Open a data set of torchvision's. --data-path may also be the very folder that it looks for."""
    folder, content = _LAYOUTS[builder]
    root = request.root.parent if request.root.name == folder else request.root
    try:
        return builder(str(root), **options)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        hint = "; --download fetches it" if options.get("download") is False else ""
        raise request.missing(f"{folder}/ with {content}{hint} ({one_line(error)})") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers. All else needs a class or a function, and those it refuses."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it wants {module}.{name}; lists, dicts, strings and numbers are read")


def read_plain_pickle(path: Path) -> Any:
    """The object in a pickle of plain containers, strings and numbers; nothing in the file is executed.

    Raises:
        UserError: the file is damaged, too large, or holds anything else.
    """
    if path.stat().st_size > MAX_ANNOTATION_BYTES:
        raise UserError(f"{path}: larger than {MAX_ANNOTATION_BYTES} bytes, not an annotation file")
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged stream makes the unpickler fail in any way
        raise UserError(f"{path}: not a readable annotation file: {one_line(error)}") from error


def _cars_with_pickle(request: Request) -> ImageDataset:
    """cars_anno.pkl: {"train": entries, "test": entries}, or a list of entries with a test flag at the end.

    An entry is (file, label[, test]), or a dict with "fname" or "relative_im_path" and "class"[, "test"] as
    in the devkit; labels count from 0 or from 1. Files are looked for as given, and below train/, test/,
    cars_train/ and cars_test/.
    """
    path = request.root / "cars_anno.pkl"
    try:
        entries = _car_entries(read_plain_pickle(path))
        first_label = min(label for _, label, _ in entries)
        last_label = max(label for _, label, _ in entries)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{path}: expected {{'train': [(file, label), …], 'test': […]}} or a list of "
            f"(file, label, is_test), found something else ({error!r})"
        ) from error
    if first_label not in (0, 1):
        raise UserError(f"{path}: labels should count from 0 or 1, the smallest is {first_label}")
    folders = ("train", "cars_train", "") if request.train else ("test", "cars_test", "")
    chosen = [(file, label - first_label) for file, label, test in entries if test != request.train]
    paths = [_find_file(request, file, folders) for file, _ in chosen]
    return ImageFiles(
        paths, [label for _, label in chosen], [f"{i + 1:03d}" for i in range(last_label - first_label + 1)]
    )


def _car_entries(content: dict | list) -> list[tuple[str, int, bool]]:
    if isinstance(content, dict):
        return [
            (*_car_entry(entry)[:2], test) for test, key in ((False, "train"), (True, "test")) for entry in content[key]
        ]
    return [_car_entry(entry) for entry in content]


def _car_entry(entry: Sequence | dict) -> tuple[str, int, bool]:
    if isinstance(entry, dict):
        file = entry["fname"] if "fname" in entry else entry["relative_im_path"]
        return str(file), int(entry["class"]), bool(entry.get("test", False))
    return str(entry[0]), int(entry[1]), bool(entry[-1]) if len(entry) > 2 else False


def _find_file(request: Request, file: str, folders: Sequence[str]) -> str:
    for folder in folders:
        if (request.root / folder / file).is_file():
            return str(request.root / folder / file)
    raise request.missing(f"{file}, which its annotations name, in {' or '.join(f or '.' for f in folders)}")


INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


def _inat(request: Request) -> ImageDataset:
    """INaturalist 2018 or 2019: train2018.json, val2018.json, categories.json and the images they name.

    Labels are numbered as in DeiT, by first appearance in the training annotations.
    """
    year = {"INAT": 2018, "INAT19": 2019}[request.name]
    if request.inat_category not in INAT_CATEGORIES:
        raise UserError(f"--inat-category {request.inat_category}: one of {', '.join(INAT_CATEGORIES)}")
    try:
        category_names = {
            int(category["id"]): str(category[request.inat_category])
            for category in _annotations(request, "categories.json")
        }
        training = _annotations(request, f"train{year}.json")
        wanted = training if request.train else _annotations(request, f"val{year}.json")
        class_names = list(dict.fromkeys(category_names[entry["category_id"]] for entry in training["annotations"]))
        label_of = {name: label for label, name in enumerate(class_names)}
        category_of = {entry["image_id"]: entry["category_id"] for entry in wanted["annotations"]}
        paths = [_inat_path(request.root, image["file_name"]) for image in wanted["images"]]
        labels = [label_of[category_names[category_of[image["id"]]]] for image in wanted["images"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise request.missing(f"iNaturalist's annotations, but an entry is not complete ({error!r})") from error
    return ImageFiles(paths, labels, class_names)


def _annotations(request: Request, file: str) -> Any:
    path = request.root / file
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise request.missing(f"{file} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def _inat_path(root: Path, file_name: str) -> str:
    """As the archive unpacks, or without the folder of the supercategory, where DeiT looks."""
    path = root / file_name
    parts = path.relative_to(root).parts
    short = root.joinpath(parts[0], *parts[2:])
    return str(short if not path.exists() and short.exists() else path)


def _hugging_face(request: Request) -> ImageDataset:
    """hfds/NAME, or hfds/PATH of a local folder; the data path is the cache."""
    _import_hugging_face()
    problems = []
    for split in ("train",) if request.train else ("validation", "val", "test"):
        try:
            found = create_dataset(request.name, root=str(request.root), split=split)
            return HuggingFaceImages(f"{request.name}/{split}", found.reader)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            problems.append(f"{split}: {one_line(error)}")
    raise UserError(f"--data-set {request.name}: cannot be opened ({'; '.join(problems)})")


def _import_hugging_face() -> None:
    """Make ``import datasets``, as timm and the package itself write it, mean Hugging Face's package.

    This project has a module of that name. What the package lacks is looked up in it, so that
    ``from datasets import build_data`` goes on working, and workers can unpickle its classes.
    """
    ours = importlib.import_module("datasets")
    here = Path(__file__).resolve().parent
    if Path(ours.__file__).resolve().parent != here:
        return
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("datasets", elsewhere)
    if spec is None or spec.loader is None:
        raise UserError("--data-set hfds/...: needs Hugging Face's package: pip install datasets")
    package = importlib.util.module_from_spec(spec)
    sys.modules["datasets"] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        sys.modules["datasets"] = ours
        raise
    package.__getattr__ = partial(getattr, ours)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def _web_shards(request: Request) -> ImageDataset:
    """wds/NAME: tar shards in webdataset's layout (KEY.jpg beside KEY.cls, or KEY.json with "label").

    The shards are those that _info.json names for the split, or NAME-train*.tar and NAME-val*.tar (without
    NAME: train*.tar and val*.tar). timm's reader streams them, in an order that depends on the number of
    workers and cannot be resumed; here they are read by position, so that the order is keyed as for any other
    data set. They have to lie on a disk for that.
    """
    own = _shards(request, request.train)
    if not own:
        raise request.missing(
            f"shards {_shard_pattern(request.name, request.split)}, or _info.json naming "
            "them, on a disk (a remote stream cannot be read by position)"
        )
    members, labels = _index_shards(own)
    other = _shards(request, not request.train)
    all_labels = np.array(labels + (_index_shards(other)[1] if other else []))
    return TarImages(own, members, labels, [str(i) for i in range(_count_classes(all_labels))])


def _shards(request: Request, train: bool) -> list[Path]:
    splits = ("train",) if train else ("validation", "val", "test")
    for info in (request.root / "_info.json", request.root / "info.json"):
        if info.is_file():
            try:
                named = _annotations(request, info.name)["splits"]
                split = next((split for split in splits if split in named), None)
                return [request.root / file for file in named[split]["filenames"]] if split else []
            except (KeyError, TypeError) as error:
                raise UserError(f"{info}: no splits with filenames in it") from error
    found = (sorted(request.root.glob(_shard_pattern(request.name, split))) for split in splits)
    return next(filter(None, found), [])


def _shard_pattern(name: str, split: str) -> str:
    prefix = name.partition("/")[2]
    return f"{prefix}-{split}*.tar" if prefix else f"{split}*.tar"


def _index_shards(shards: Sequence[Path]) -> tuple[list[tuple[int, str, int, int]], list[int]]:
    members, labels = [], []
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, "r:") as tar:
                found = list(_samples_of_shard(tar))
        except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{shard}: not a readable shard: {one_line(error)}") from error
        members += [(number, image.name, image.offset_data, image.size) for image, _ in found]
        labels += [label for _, label in found]
    return members, labels


def _samples_of_shard(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, int]]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        if member.isfile():
            folder, _, file = member.name.rpartition("/")
            stem, _, suffix = file.partition(".")
            samples.setdefault(f"{folder}/{stem}", {})[f".{suffix.lower()}"] = member
    for key, files in samples.items():
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        if image is None:
            continue
        if ".cls" in files:
            label = int(tar.extractfile(files[".cls"]).read())
        elif ".json" in files:
            label = int(json.load(tar.extractfile(files[".json"]))["label"])
        else:
            raise ValueError(f"{key} has neither .cls nor .json")
        if label < 0:
            raise ValueError(f"{key} has the negative label {label}")
        yield image, label


@dataclass(frozen=True)
class DatasetSpec:
    """How a data set is built, and what it needs of the command line and the augmentation."""

    build: Callable[[Request], ImageDataset]
    downloads: bool = False  # takes --download, if only to say what to do instead
    embedded: bool = False  # needs no --data-path
    glyphs: bool = False  # mirrored, or cropped strongly, an image may be of another class


DATASETS: dict[str, DatasetSpec] = {
    "DIGITS": DatasetSpec(_digits, embedded=True, glyphs=True),
    "CIFAR10": DatasetSpec(_cifar, downloads=True),
    "CIFAR100": DatasetSpec(_cifar, downloads=True),
    "IMNET": DatasetSpec(_folder),
    "FOLDER": DatasetSpec(_folder),
    "FLOWERS": DatasetSpec(_flowers, downloads=True),
    "CARS": DatasetSpec(_cars, downloads=True),
    "PETS": DatasetSpec(_pets, downloads=True),
    "INAT": DatasetSpec(_inat),
    "INAT19": DatasetSpec(_inat),
    "hfds/": DatasetSpec(_hugging_face, downloads=True),
    "wds/": DatasetSpec(_web_shards),
}


def dataset_spec(name: str) -> DatasetSpec:
    """The entry of `DATASETS` for a name as given to --data-set; raises UserError for an unknown one."""
    key = name.partition("/")[0] + "/" if "/" in name else name
    if key not in DATASETS:
        raise UserError(f"--data-set {name}: unknown; choose one of {', '.join(DATASETS)}")
    return DATASETS[key]


def build_dataset(
    name: str,
    root: str | os.PathLike | None,
    train: bool,
    *,
    download: bool = False,
    inat_category: str = "name",
    classes: Sequence[str] | None = None,
) -> ImageDataset:
    """Open a data set.

    Args:
        name: a key of `DATASETS`, or ``hfds/…`` or ``wds/…``.
        root: its folder, --data-path; ``DIGITS`` needs none.
        train: the training split, else the one to validate on.
        download: fetch it where that is possible.
        inat_category: the taxonomic rank that is the class, for INAT and INAT19.
        classes: keep only these, by name or number, labelled in this order.

    Raises:
        UserError: unknown name, missing or damaged files, an empty class, classes that differ between splits.
    """
    spec = dataset_spec(name)
    if root is None and not spec.embedded:
        raise UserError(f"--data-set {name}: --data-path has to say where its files are")
    if download and not spec.downloads:
        raise UserError(f"--download: --data-set {name} cannot be downloaded; put its files into --data-path")
    folder = Path(root or ".")
    if not folder.is_dir() and not download:
        raise UserError(f"--data-path {folder}: no such folder")
    try:
        dataset = spec.build(Request(name, folder, train, download, inat_category))
    except OSError as error:
        raise UserError(f"--data-set {name} --data-path {folder}: {one_line(error)}") from error
    if len(dataset) == 0:
        raise UserError(f"--data-set {name} --data-path {folder}: no images in it")
    return dataset if classes is None else ClassSubset(dataset, classes)
