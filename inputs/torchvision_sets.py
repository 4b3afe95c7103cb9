"""The data sets that torchvision reads: CIFAR, Oxford Flowers, Stanford Cars, Oxford-IIIT Pets."""

from __future__ import annotations

from torchvision.datasets import CIFAR10, CIFAR100, Flowers102, OxfordIIITPet, StanfordCars, VisionDataset

from inputs.cars_pickle import PICKLE, cars_with_pickle
from inputs.folders import class_folders, has_class_folders
from inputs.image_sets import ImageArrays, ImageDataset, ImageFiles
from inputs.request import Request
from utils import UserError, one_line

# The folder that torchvision looks for below the root, and what has to be in it.
_LAYOUTS = {
    CIFAR10: ("cifar-10-batches-py", "the Python version of CIFAR-10"),
    CIFAR100: ("cifar-100-python", "the Python version of CIFAR-100"),
    Flowers102: (
        "flowers-102",
        "jpg/*.jpg, imagelabels.mat and setid.mat (or, instead of it, class folders in train/ and test/)",
    ),
    StanfordCars: (
        "stanford_cars",
        "devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_train/, "
        "cars_test_annos_withlabels.mat and cars_test/ (or, instead of "
        "it, cars_anno.pkl, train/ and test/)",
    ),
    OxfordIIITPet: ("oxford-iiit-pet", "images/ and annotations/"),
}


def cifar(request: Request) -> ImageDataset:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009), the Python version."""
    builder = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}[request.name]
    data = _open(builder, request, train=request.train, download=request.download)
    return ImageArrays(f"{request.name}/{request.split}", data.data, data.targets, data.classes)


def flowers(request: Request) -> ImageDataset:
    """Oxford 102 Flowers: torchvision's layout, or class folders in train/ and test/.

    Trained on train and val, 2,040 images, and validated on test, as the published transfers are.
    """
    if has_class_folders(request.root):
        return class_folders(request)
    parts = [
        _open(Flowers102, request, split=split, download=request.download)
        for split in (("train", "val") if request.train else ("test",))
    ]
    paths = [str(path) for part in parts for path in part._image_files]
    labels = [label for part in parts for label in part._labels]
    return ImageFiles(paths, labels, Flowers102.classes)


def cars(request: Request) -> ImageDataset:
    """Stanford Cars: torchvision's layout with the devkit, or a folder with cars_anno.pkl."""
    if request.download:
        raise UserError(
            "--download: Stanford Cars is no longer offered for download; put its files into "
            f"{request.root}/stanford_cars: devkit/cars_meta.mat, devkit/cars_train_annos.mat, "
            "cars_test_annos_withlabels.mat, cars_train/*.jpg and cars_test/*.jpg"
        )
    if (request.root / PICKLE).is_file():
        return cars_with_pickle(request)
    data = _open(StanfordCars, request, split="train" if request.train else "test")
    paths, labels = zip(*data._samples, strict=True)
    return ImageFiles(paths, labels, data.classes)


def pets(request: Request) -> ImageDataset:
    """Oxford-IIIT Pets: trained on trainval, validated on test."""
    data = _open(OxfordIIITPet, request, split="trainval" if request.train else "test", download=request.download)
    return ImageFiles([str(path) for path in data._images], data._labels, data.classes)


def _open(builder: type, request: Request, **options: str | bool) -> VisionDataset:
    """Open a data set of torchvision's. --data-path may also be the very folder that it looks for."""
    folder, content = _LAYOUTS[builder]
    root = request.root.parent if request.root.name == folder else request.root
    try:
        return builder(str(root), **options)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        hint = "; --download fetches it" if options.get("download") is False else ""
        raise request.missing(f"{folder}/ with {content}{hint} ({one_line(error)})") from error
