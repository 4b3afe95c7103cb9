"""The data sets iNaturalist 2018 and 2019."""

import json
from pathlib import Path

from inputs.dataset_options import DatasetOptions
from inputs.images import ImageDataset, file_dataset

RANKS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")  # of --inat-category


def inaturalist(options: DatasetOptions) -> ImageDataset:
    """Open train{year}.json, val{year}.json, categories.json and the images that they list.

    As in DeiT, labels are numbered in the order in which classes first appear in the training annotations.
    """
    year = {"INAT": 2018, "INAT19": 2019}[options.name]
    files = ("categories.json", f"train{year}.json", f"{'train' if options.train else 'val'}{year}.json")
    try:
        categories, training, wanted = (json.loads((options.root / file).read_bytes()) for file in files)
        category_names = {int(category["id"]): str(category[options.inat_category]) for category in categories}
        class_names = list(dict.fromkeys(category_names[entry["category_id"]] for entry in training["annotations"]))
        label_of = {name: label for label, name in enumerate(class_names)}
        category_of = {entry["image_id"]: entry["category_id"] for entry in wanted["annotations"]}
        paths = [_image_path(options.root, image["file_name"]) for image in wanted["images"]]
        labels = [label_of[category_names[category_of[image["id"]]]] for image in wanted["images"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise options.missing(f"iNaturalist's {', '.join(files)}, but one is incomplete ({error!r})") from error
    return file_dataset(paths, labels, class_names)


def _image_path(root: Path, file_name: str) -> str:
    """The path in the archive, or DeiT's path without the supercategory folder if only that exists."""
    path = root / file_name
    parts = path.relative_to(root).parts
    short = root.joinpath(parts[0], *parts[2:])
    return str(short if not path.exists() and short.exists() else path)
