"""Finds a Hugging Face data set's Arrow files, in a process of its own: a script that `hugging_face` runs.

Only there does ``import datasets`` mean Hugging Face's package, as the package itself takes for granted; in the
project's own processes it means the module at the root. So this file imports nothing of the project.

    python -P locate_hugging_face.py NAME CACHE SPLIT...

The data set is prepared in the folder CACHE, or with CACHE empty in Hugging Face's own, unless it lies on disk as
`save_to_disk` wrote it. Prints a JSON object about the first of the splits that there is, or {"error": reason}.
"""

import contextlib
import json
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in the folder of a data set


def locate(name: str, cache: str, splits: list[str]) -> dict:
    """The first of `splits`: its name, number of rows, Arrow files, columns of images and labels, class names or None.

    Raises whatever Hugging Face's package raises, and ValueError for a split or a column that is not there.
    """
    from datasets import ClassLabel, Image, load_dataset, load_from_disk

    if any((Path(name) / file).is_file() for file in SAVED):
        found = load_from_disk(name, keep_in_memory=False)
    else:
        found = load_dataset(name, cache_dir=cache or None, keep_in_memory=False)
    parts = found if isinstance(found, dict) else {str(found.split or "train"): found}
    split = next((split for split in splits if split in parts), None)
    if split is None:
        raise ValueError(f"no split {' or '.join(splits)}; it has {', '.join(map(str, parts))}")
    features = parts[split].features
    image, label = column_of(features, "image", Image), column_of(features, "label", ClassLabel)
    if not isinstance(features[image], Image):
        raise ValueError(f"column {image!r}: holds no images; make it an Image")
    return {
        "split": split,
        "rows": len(parts[split]),
        "files": [str(Path(file["filename"]).resolve()) for file in parts[split].cache_files],
        "image": image,
        "label": label,
        "class_names": getattr(features[label], "names", None),
    }


def column_of(features: dict, name: str, kind: type) -> str:
    """The column of that name, else the only one of that kind."""
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    if name in features or len(fitting) == 1:
        return name if name in features else fitting[0]
    raise ValueError(f"no column {name!r}, nor a single one of kind {kind.__name__}, among {', '.join(features)}")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # of a Ctrl-C the project's process tells
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    name, cache, *splits = sys.argv[1:]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = locate(name, cache, splits)
    except ModuleNotFoundError as error:
        missing = error.name == "datasets"
        answer = {"error": "it needs Hugging Face's package: pip install datasets" if missing else str(error)}
    except Exception as error:  # a data set's builder raises anything
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
