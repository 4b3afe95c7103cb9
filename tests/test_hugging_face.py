"""hfds/...: data sets of Hugging Face's package."""

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from PIL import Image
from test_datasets import arguments, make_tree, number_of, samples

from inputs.catalogue import build_dataset
from inputs.data import build_data
from inputs.hugging_face import import_package
from runtime.processes import Distributed
from utils import UserError

pytestmark = pytest.mark.slow
SPLITS = {"train": [[0, 1, 2, 3, 4], [0, 1, 0, 1, 1]], "validation": [[5, 6, 7], [1, 0, 1]]}
UNUSABLE = {  # data sets that cannot be classified, and what the error says about them
    "no split train; it has test": {"splits": {"test": [[0], [0]]}},
    "column 'label': not every row has a class number": {"splits": {"train": [[0], ["cat"]]}, "kind": "text"},
    "some labels are negative": {"splits": {"train": [[0], [-1]]}, "kind": "number"},
    "no column 'label' and no single column of type ClassLabel among image, age": {
        "splits": {"train": [[0], [0]]},
        "kind": "number",
        "label": "age",
    },
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """The package reads these variables when it is imported."""
    folder = tmp_path_factory.mktemp("own cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # timm has imported it already
        patch.setenv("HF_HOME", str(folder))
        yield folder


def save(folder: Path, splits: dict, image="image", label="label", kind="class") -> str:
    """Save a data set with `save_to_disk`; `splits` maps each split to (numbers of images, labels)."""
    datasets = import_package()

    kinds = {"class": datasets.ClassLabel(names=["cat", "dog"]), "text": datasets.Value("string")}
    types = {image: datasets.Image()}
    types[label] = kinds.get(kind, datasets.Value("int64"))
    parts = datasets.DatasetDict()
    for name, (numbers, labels) in splits.items():
        images = [Image.fromarray(np.full((10, 12, 3), (10 * number, 100, 200), np.uint8)) for number in numbers]
        columns = {image: images, label: labels}
        parts[name] = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    parts.save_to_disk(folder)
    return f"hfds/{folder}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("columns", [{}, {"image": "img", "label": "species"}], ids=["usual", "other"])
def test_a_data_set_saved_to_disk_is_read_in_place_by_its_columns_kinds(tmp_path, columns):
    name = save(tmp_path / "pets", SPLITS, **columns)
    before = contents(tmp_path)
    train, val = (build_dataset(name, None, split) for split in ("train", "val"))
    assert samples(train) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 1)] and samples(val) == [(5, 1), (6, 0), (7, 1)]
    assert train.class_names == val.class_names == ("cat", "dog")
    assert train.path(1) == f"{name}/train[1]"
    for workers in (0, 2):
        train, val = build_data(arguments(data_set=name, batch_size=5, num_workers=workers), Distributed())
        assert sorted(next(train.epoch(0)).indices.tolist()) == [0, 1, 2, 3, 4]
        assert next(iter(val)).targets.tolist() == [1, 0, 1]
    assert contents(tmp_path) == before


def test_a_folder_of_images_is_prepared_elsewhere_even_if_the_cache_is_said_to_be_there(tmp_path, own_cache):
    folder = make_tree(tmp_path / "photos", splits=("train",))
    (tmp_path / "cache").mkdir()
    before = contents(folder)
    for cache in (None, folder, tmp_path / "cache"):
        train = build_dataset(f"hfds/{folder}", cache, "train")
        assert samples(train) == [(0, 0), (1, 0), (2, 1), (3, 1)] and train.class_names == ("cat", "dog")
        assert contents(folder) == before
    assert contents(tmp_path / "cache") and contents(own_cache)
    with pytest.raises(UserError, match="no split val or validation or valid or test; it has train"):
        build_dataset(f"hfds/{folder}", None, "val")
    (folder / "train" / "dog" / "0.png").unlink()
    assert number_of(train.load(1)[0]) == 1
    with pytest.raises(UserError, match=r"photos/train\[2\]: cannot be read"):
        train.load(2)


def test_classes_without_names_are_named_by_their_numbers(tmp_path):
    name = save(tmp_path / "numbers", {"train": [[0, 1], [2, 0]], "test": [[2], [1]]}, kind="number")
    train, test = (build_dataset(name, None, split) for split in ("train", "val"))
    assert train.class_names == ("0", "1", "2") and samples(test) == [(2, 1)]


@pytest.mark.parametrize(("message", "plan"), UNUSABLE.items(), ids=UNUSABLE)
def test_a_data_set_that_cannot_be_classified_is_refused_in_one_line(tmp_path, message, plan):
    name = save(tmp_path / "unusable", **plan)
    with pytest.raises(UserError, match=f"--data-set {name}: .*{message}") as caught:
        build_dataset(name, None, "train")
    assert "\n" not in str(caught.value)


def test_a_name_that_does_not_exist_is_refused_in_one_line():
    with pytest.raises(UserError, match="--data-set hfds/nobody/nothing: ") as caught:
        build_dataset("hfds/nobody/nothing", None, "train")
    assert "\n" not in str(caught.value)
