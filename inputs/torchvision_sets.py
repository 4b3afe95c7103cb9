"""The data sets that torchvision reads: CIFAR, Oxford Flowers, Stanford Cars, Oxford-IIIT Pets."""

import io
import pickle
from typing import NoReturn

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100, Flowers102, OxfordIIITPet, StanfordCars, VisionDataset

from inputs.dataset_options import SPLIT_NAMES, DatasetOptions
from inputs.folders import class_folders, split_folder
from inputs.images import ImageDataset, array_dataset, file_dataset
from utils import UserError, one_line

# The folder that torchvision reads in --data-path, and its required content.
_CONTENTS = {
    "cifar-10-batches-py": "the Python version of CIFAR-10",
    "cifar-100-python": "the Python version of CIFAR-100",
    "flowers-102": "jpg/*.jpg, imagelabels.mat and setid.mat (or class folders in train/ and test/)",
    "stanford_cars": "devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_train/, cars_test_annos_withlabels.mat "
    "and cars_test/ (or cars_anno.pkl, train/ and test/)",
    "oxford-iiit-pet": "images/ and annotations/",
}
_CARS_PICKLE = "cars_anno.pkl"


def cifar(options: DatasetOptions) -> ImageDataset:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009), the Python version."""
    builder = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}[options.name]
    data = _open(builder, builder.base_folder, options, train=options.train, download=options.download)
    return array_dataset(f"{options.name}/{options.split}", data.data, data.targets, data.classes)


def flowers(options: DatasetOptions) -> ImageDataset:
    """Oxford 102 Flowers, in torchvision's layout or as class folders in train/ and test/.

    As in published transfer results, the training set is train and val (2,040 images), and validation uses test.
    """
    if split_folder(options.root, SPLIT_NAMES["train"] + SPLIT_NAMES["val"]) is not None:
        return class_folders(options)
    parts = [
        _open(Flowers102, "flowers-102", options, split=split, download=options.download)
        for split in (("train", "val") if options.train else ("test",))
    ]
    paths = [path for part in parts for path in part._image_files]
    labels = [label for part in parts for label in part._labels]
    return file_dataset(paths, labels, Flowers102.classes)


def cars(options: DatasetOptions) -> ImageDataset:
    """Stanford Cars, in torchvision's layout with the devkit or with cars_anno.pkl."""
    if (options.root / _CARS_PICKLE).is_file():
        return _cars_with_pickle(options)
    data = _open(StanfordCars, "stanford_cars", options, split="train" if options.train else "test")
    paths, labels = zip(*data._samples, strict=True)
    return file_dataset(paths, labels, data.classes)


def _cars_with_pickle(options: DatasetOptions) -> ImageDataset:
    """Read cars_anno.pkl: {"train": [(file, label), ...], "test": [...]}, or a list of (file, label, ..., is_test).

    The files are in train/ and test/, or in cars_train/ and cars_test/.
    """
    path, split = options.root / _CARS_PICKLE, "train" if options.train else "test"
    folder = split_folder(options.root, (split, f"cars_{split}")) or options.root
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        if isinstance(content, dict):
            content = [(*entry[:2], part == "test") for part in ("train", "test") for entry in content[part]]
        numbers, labels = np.unique([entry[1] for entry in content], return_inverse=True)
        chosen = [i for i, entry in enumerate(content) if bool(entry[-1]) != options.train]
        files = [folder / content[i][0] for i in chosen]
    except Exception as error:  # pickle raises many types of errors for a damaged file
        raise UserError(f"{path}: not the annotations of Stanford Cars: {one_line(error)}") from error
    return file_dataset(files, labels[chosen], [f"{i + 1:03d}" for i in range(len(numbers))])


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers, and refuses everything that would run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; only plain values are allowed")


def pets(options: DatasetOptions) -> ImageDataset:
    """Oxford-IIIT Pets: the training set is trainval, and validation uses test."""
    split = "trainval" if options.train else "test"
    data = _open(OxfordIIITPet, "oxford-iiit-pet", options, split=split, download=options.download)
    return file_dataset(data._images, data._labels, data.classes)


def _open(builder: type, folder: str, options: DatasetOptions, **arguments: str | bool) -> VisionDataset:
    """Open one of torchvision's data sets. --data-path may be `folder`, which torchvision reads, or its parent."""
    root = options.root.parent if options.root.name == folder else options.root
    try:
        return builder(str(root), **arguments)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        hint = "; --download fetches it" if arguments.get("download") is False else ""
        raise options.missing(f"{folder}/ with {_CONTENTS[folder]}{hint} ({one_line(error)})") from error
