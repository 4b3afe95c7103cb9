"""hfds/...: the real package, in a process of its own; its files, read in this one."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from test_datasets import arguments, make_tree, number_of, samples

import datasets
from inputs.catalogue import build_dataset
from runtime.processes import Distributed
from utils import UserError

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
    "holds string and not class numbers": {"splits": {"train": [[0], ["cat"]]}, "kind": "text"},
    "some rows have no label": {"splits": {"train": [[0, 1], [None, 1]]}, "kind": "number"},
    "some labels are negative": {"splits": {"train": [[0], [-1]]}, "kind": "number"},
    "column 'image': holds no images": {"splits": {"train": [[0], [0]]}, "bare": True},
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


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "own cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_data_set_saved_to_disk_is_read_where_it_lies(saved, tmp_path):
    folder, before = saved / "pets", contents(saved)
    train, val = (build_dataset(f"hfds/{folder}", None, split) for split in (True, False))
    assert samples(train) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 1)] and samples(val) == [(5, 1), (6, 0), (7, 1)]
    assert train.class_names == val.class_names == ("cat", "dog")
    assert train.path(1) == f"hfds/{folder}/train[1]"
    assert contents(saved) == before and contents(tmp_path) == {}


def test_a_folder_of_images_is_prepared_elsewhere_even_if_the_cache_is_said_to_be_there(tmp_path):
    folder = make_tree(tmp_path / "photos")
    (tmp_path / "cache").mkdir()
    before = contents(folder)
    for cache in (None, folder, tmp_path / "cache"):
        train = build_dataset(f"hfds/{folder}", cache, True)
        assert samples(train) == [(0, 0), (1, 0), (2, 1), (3, 1)] and train.class_names == ("cat", "dog")
        assert contents(folder) == before
    assert contents(tmp_path / "cache") and contents(tmp_path / "own cache")


def test_this_process_keeps_its_own_module_of_that_name(saved):
    build_dataset(f"hfds/{saved / 'pets'}", None, True)
    assert sys.modules["datasets"] is datasets and datasets.__file__ == str(ROOT / "datasets.py")
    assert not [name for name in sys.modules if name.startswith("datasets.")]


LOAD = """
import sys

if __name__ == "__main__":  # not in the workers, which import it too
    sys.path[:0] = [{root!r}, {root!r} + "/tests"]
    import hashlib, multiprocessing
    import datasets
    from test_datasets import arguments
    from runtime.processes import Distributed

    for method in (None, "fork", "spawn", "forkserver"):
        multiprocessing.set_start_method(method, force=True)
        args = arguments(data_set="hfds/" + sys.argv[1], num_workers=1 if method else 0, batch_size=2)
        loader = datasets.build_data(args, Distributed()).train
        batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
        print([(b.indices.tolist(), b.targets.tolist(), hashlib.sha256(b.images.numpy()).hexdigest()) for b in batches])
    assert sys.modules["datasets"] is datasets
"""


def test_workers_started_in_any_way_read_the_same(saved, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(LOAD.format(root=str(ROOT)))
    told = run_python(str(script), str(saved / "pets"), env=os.environ | {"OMP_NUM_THREADS": "1"}).splitlines()
    assert len(told) == 4 and len(ast.literal_eval(told[0])) == 2 * 2
    assert set(told) == {told[0]}


def test_a_started_process_is_not_sent_the_images(saved):
    dataset = build_dataset(f"hfds/{saved / 'pets'}", None, True)
    sent = pickle.dumps(dataset)
    assert b"IHDR" not in sent
    assert samples(pickle.loads(sent)) == samples(dataset)


def test_columns_of_other_names_are_found_by_their_kind(saved):
    assert samples(build_dataset(f"hfds/{saved / 'other columns'}", None, True))[:2] == [(0, 0), (1, 1)]


def test_classes_without_names_are_named_by_their_numbers(saved):
    train, test = (build_dataset(f"hfds/{saved / 'numbers'}", None, split) for split in (True, False))
    assert train.class_names == ("0", "1", "2") and samples(test) == [(2, 1)]


def test_a_single_split_is_the_training_set(saved):
    assert len(build_dataset(f"hfds/{saved / 'alone'}", None, True)) == 5
    with pytest.raises(UserError, match="no split validation or val or test; it has train"):
        build_dataset(f"hfds/{saved / 'alone'}", None, False)


@pytest.mark.parametrize(("number", "message"), list(enumerate(UNUSABLE)), ids=UNUSABLE)
def test_what_cannot_be_classified_is_told_in_one_line(saved, number, message):
    name = f"hfds/{saved}/unusable {number}"
    with pytest.raises(UserError, match=f"--data-set {name}: .*{message}") as caught:
        build_dataset(name, None, True)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_nowhere_is_told_in_one_line():
    with pytest.raises(UserError, match="--data-set hfds/nobody/nothing: ") as caught:
        build_dataset("hfds/nobody/nothing", None, True)
    assert "\n" not in str(caught.value)


def test_without_hugging_faces_package_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "datasets.py").write_text("raise ModuleNotFoundError(\"No module named 'datasets'\", name='datasets')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="pip install datasets"):
        build_dataset("hfds/pets", None, True)


def test_the_package_is_found_although_the_project_is_on_the_path(saved, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(ROOT)
    assert len(build_dataset(f"hfds/{saved / 'pets'}", None, True)) == 5


def test_an_image_that_is_gone_is_named_by_its_row(tmp_path):
    folder = make_tree(tmp_path / "photos", splits=("train",))
    dataset = build_dataset(f"hfds/{folder}", None, True)
    (folder / "train" / "dog" / "0.png").unlink()
    assert number_of(dataset.load(1)[0]) == 1
    with pytest.raises(UserError, match=r"photos/train\[2\]: cannot be read"):
        dataset.load(2)


def test_training_and_validation_come_from_one_command_line(saved):
    data = datasets.build_data(arguments(data_set=f"hfds/{saved / 'pets'}", batch_size=5), Distributed())
    assert sorted(next(data.train.epoch(0)).indices.tolist()) == [0, 1, 2, 3, 4]
    assert next(iter(data.val)).targets.tolist() == [1, 0, 1]
