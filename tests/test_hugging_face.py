"""hfds/...: the real package, beside the project's module of its name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from test_datasets import arguments, make_tree, number_of, samples

import datasets
from inputs.catalogue import build_dataset
from runtime.processes import Distributed
from utils import UserError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent

WRITE = """
import json, sys
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

KINDS = {"class": ClassLabel(names=["cat", "dog"]), "number": Value("int64"), "text": Value("string")}


def split(plan, numbers, labels):
    images = [np.full((10, 12, 3), (10 * number, 100, 200), np.uint8) for number in numbers]
    images = [image.tobytes() if "bare" in plan else Pillow.fromarray(image) for image in images]
    kind = Value("binary") if "bare" in plan else Image()
    features = Features({plan["image"]: kind, plan["label"]: KINDS[plan["kind"]]})
    return Dataset.from_dict({plan["image"]: images, plan["label"]: labels}, features=features)


for folder, plan in json.load(sys.stdin).items():
    plan = {"image": "image", "label": "label", "kind": "class"} | plan
    parts = {name: split(plan, *rows) for name, rows in plan["splits"].items()}
    if "alone" in plan:
        parts["train"].save_to_disk(folder)
    else:
        DatasetDict(parts).save_to_disk(folder, num_shards={name: min(2, len(part)) for name, part in parts.items()})
"""
SPLITS = {"train": [[0, 1, 2, 3, 4], [0, 1, 0, 1, 1]], "validation": [[5, 6, 7], [1, 0, 1]]}
UNUSABLE = {  # data sets that cannot be classified, and what is said about them
    "no split train; it has test": {"splits": {"test": [[0], [0]]}},
    "column 'label': not every row has a class number": {"splits": {"train": [[0], ["cat"]]}, "kind": "text"},
    "some labels are negative": {"splits": {"train": [[0], [-1]]}, "kind": "number"},
    "column 'image': contains no images": {"splits": {"train": [[0], [0]]}, "bare": True},
    "no column 'label', nor a single one of kind ClassLabel, among image, age": {
        "splits": {"train": [[0], [0]]},
        "kind": "number",
        "label": "age",
    },
}
SAVED = {
    "pets": {"splits": SPLITS},
    "other columns": {"splits": SPLITS, "image": "img", "label": "species"},
    "numbers": {"splits": {"train": [[0, 1], [2, 0]], "test": [[2], [1]]}, "kind": "number"},
    "alone": {"splits": SPLITS, "alone": True},
} | {f"unusable {i}": plan for i, plan in enumerate(UNUSABLE.values())}


def run_python(*command: str, **options) -> str:
    """What a Python process without the project on its path prints."""
    done = subprocess.run([sys.executable, "-P", *command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder of data sets as `save_to_disk` of the real package wrote them."""
    folder = tmp_path_factory.mktemp("saved")
    run_python("-c", WRITE, input=json.dumps({str(folder / name): plan for name, plan in SAVED.items()}))
    return folder


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """The package reads these variables once, as it is imported."""
    folder = tmp_path_factory.mktemp("own cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # timm has imported it already
        patch.setenv("HF_HOME", str(folder))
        yield folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_data_set_saved_to_disk_is_read_where_it_lies(saved, tmp_path):
    folder, before = saved / "pets", contents(saved)
    train, val = (build_dataset(f"hfds/{folder}", None, split) for split in ("train", "val"))
    assert samples(train) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 1)] and samples(val) == [(5, 1), (6, 0), (7, 1)]
    assert train.class_names == val.class_names == ("cat", "dog")
    assert train.path(1) == f"hfds/{folder}/train[1]"
    assert contents(saved) == before and contents(tmp_path) == {}


@pytest.mark.slow
def test_a_folder_of_images_is_prepared_elsewhere_even_if_the_cache_is_said_to_be_there(tmp_path, own_cache):
    folder = make_tree(tmp_path / "photos")
    (tmp_path / "cache").mkdir()
    before = contents(folder)
    for cache in (None, folder, tmp_path / "cache"):
        train = build_dataset(f"hfds/{folder}", cache, "train")
        assert samples(train) == [(0, 0), (1, 0), (2, 1), (3, 1)] and train.class_names == ("cat", "dog")
        assert contents(folder) == before
    assert contents(tmp_path / "cache") and contents(own_cache)


@pytest.mark.slow
def test_this_process_keeps_its_own_module_of_that_name(saved):
    build_dataset(f"hfds/{saved / 'pets'}", None, "train")
    assert sys.modules["datasets"] is datasets and datasets.__file__ == str(ROOT / "datasets.py")
    assert not [name for name in sys.modules if name.startswith("datasets.")]
    assert str(ROOT) in map(os.path.abspath, sys.path)


@pytest.mark.slow
def test_columns_of_other_names_are_found_by_their_kind(saved):
    assert samples(build_dataset(f"hfds/{saved / 'other columns'}", None, "train"))[:2] == [(0, 0), (1, 1)]


@pytest.mark.slow
def test_classes_without_names_are_named_by_their_numbers(saved):
    train, test = (build_dataset(f"hfds/{saved / 'numbers'}", None, split) for split in ("train", "val"))
    assert train.class_names == ("0", "1", "2") and samples(test) == [(2, 1)]


@pytest.mark.slow
def test_a_single_split_is_the_training_set(saved):
    assert len(build_dataset(f"hfds/{saved / 'alone'}", None, "train")) == 5
    with pytest.raises(UserError, match="no split val or validation or valid or test; it has train"):
        build_dataset(f"hfds/{saved / 'alone'}", None, "val")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "message"), list(enumerate(UNUSABLE)), ids=UNUSABLE)
def test_what_cannot_be_classified_is_told_in_one_line(saved, number, message):
    name = f"hfds/{saved}/unusable {number}"
    with pytest.raises(UserError, match=f"--data-set {name}: .*{message}") as caught:
        build_dataset(name, None, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_name_that_is_nowhere_is_told_in_one_line():
    with pytest.raises(UserError, match="--data-set hfds/nobody/nothing: ") as caught:
        build_dataset("hfds/nobody/nothing", None, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_image_that_is_gone_is_named_by_its_row(tmp_path):
    folder = make_tree(tmp_path / "photos", splits=("train",))
    dataset = build_dataset(f"hfds/{folder}", None, "train")
    (folder / "train" / "dog" / "0.png").unlink()
    assert number_of(dataset.load(1)[0]) == 1
    with pytest.raises(UserError, match=r"photos/train\[2\]: cannot be read"):
        dataset.load(2)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_and_validation_come_from_one_command_line(saved, workers):
    args = arguments(data_set=f"hfds/{saved / 'pets'}", batch_size=5, num_workers=workers)
    data = datasets.build_data(args, Distributed())
    assert sorted(next(data.train.epoch(0)).indices.tolist()) == [0, 1, 2, 3, 4]
    assert next(iter(data.val)).targets.tolist() == [1, 0, 1]
