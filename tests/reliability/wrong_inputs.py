"""Something wrong in any place: in every field of every kind of file, in every flag. Drawn from seeds."""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import torch
import yaml
from harness import TINY_DETECTION
from PIL import Image

import infer
from detection.coco import CocoImages
from detection.flags import FLAGS as DETECTION_FLAGS
from inputs.label_maps import MAP_SHAPE, read_label_map
from runtime import checkpoints
from training.classification_flags import FLAGS
from training.options import build_parser

# What it is, what a refusal has to name, and a command line or a call that meets with it.
Input = tuple[str, str, "list[str] | Callable[[], object]"]


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = wrap(value)
    return value


# Of every kind that JSON has. Each call makes a new one.
VALUES: tuple[Callable[[], Any], ...] = (
    *(lambda value=value: value for value in (None, True, False, 0, 1, -1, 7, 2**31, 2**53, 2**62, 2**63, -(2**63))),
    *(lambda value=value: value for value in (2**64, 2**200, 10**400, 0.5, -0.5, -0.0, 1e-300, 5e-324, 1e300)),
    *(lambda value=value: value for value in (math.nan, math.inf, -math.inf, "", " ", "text", "1", "0", "nan", "1e5")),
    *(lambda value=value: value for value in ("\0", "\x1b[31m", "\x1b]0;x\x07", "\udcff", "é" * 100, "=1+1", "a\nb")),
    *(lambda value=value: value for value in ("../../../etc/passwd", "/dev/zero", "/dev/full", "http://localhost:9")),
    lambda: "a" * 10**6,
    lambda: "9" * 5000,
    lambda: [],
    lambda: {},
    lambda: [0],
    lambda: [None, None],
    lambda: ["a", "b", "c"],
    lambda: [1.5] * 3,
    lambda: [[[]]],
    lambda: [0] * 10**5,
    lambda: {"a": 1},
    lambda: {"": None},
    lambda: nested(60, lambda value: [value]),
    lambda: nested(60, lambda value: {"a": value}),
)
# What a pickle has beside.
OBJECTS: tuple[Callable[[], Any], ...] = (
    lambda: (1, 2),
    lambda: {1: 2},
    lambda: {None: 0},
    lambda: b"bytes",
    lambda: argparse.Namespace(a=1),
    lambda: torch.zeros(0),
    lambda: torch.tensor(math.nan),
    lambda: torch.zeros(3, dtype=torch.int8),
    lambda: torch.zeros(2, 2, dtype=torch.complex64),
    lambda: torch.zeros(1).expand(1 << 40),
    lambda: torch.zeros(1).expand(1 << 62),
    lambda: torch.zeros(2, requires_grad=True),
    lambda: nested(100, lambda value: [value]),
    lambda: torch.float16,
    lambda: torch.device("meta"),
    lambda: torch.Size([2]),
)
WORDS = (
    *(
        "",
        " ",
        "0",
        "1",
        "-1",
        "-0",
        "00",
        "1_0",
        "0x10",
        "1e3",
        "1e400",
        "-1e400",
        "nan",
        "inf",
        "-inf",
        "NaN",
        "½",
        "²",
    ),
    *(
        "١٢",
        "0.5",
        ".5",
        "5.",
        "1,5",
        "1,2,3",
        "3,2,1",
        ",",
        "1;2",
        "true",
        "None",
        "[1]",
        "{}",
        "()",
        "a b",
        "a=b",
        "=",
        "a=",
    ),
    *(
        "--",
        "-",
        "-x",
        "*",
        "**",
        "[",
        "[a",
        "\\",
        "%s",
        "%(default)s",
        "{}{}",
        "\0",
        "a\0b",
        "\x1b[31m",
        "\udcff",
        "é",
        "\n",
    ),
    *(
        "none",
        "auto",
        "all",
        "rand",
        "rand-",
        "rand-m9-n",
        "rand-m-1",
        "augmix-",
        "original-mstd1e400",
        "v0-inc",
        "cuda:-1",
    ),
    *(
        "1:",
        ":1",
        "0.1:2:3",
        "1x1",
        "0x0",
        "1x",
        "x1",
        "1x1x1",
        "8x8",
        "999x1",
        "/dev/full",
        "/dev/zero",
        "/nowhere",
        "..",
        ".",
    ),
    *(
        str(2**31),
        str(2**62),
        str(2**63),
        str(2**64),
        "9" * 400,
        "9" * 5000,
        "1" + "0" * 308 + ".0",
        "a" * 10**5,
        "(" * 300,
    ),
    *(
        "1e-320",
        "99999",
        "1000000",
        "0.999999999999",
        "-0.1",
        "1.0000001",
        "wds/**[",
        "wds/x",
        "hfds/",
        "timm/resnet18",
    ),
)
# Those that name where to write are not told of places outside the test's directory.
WRITTEN = {"output_dir", "output", "report", "drawings", "explain"}
NEVER = {"help", "wandb"}  # the one ends the program; the other hands over to a service


def spoil(tree: Any, drawn: random.Random, values: tuple[Callable[[], Any], ...] = VALUES) -> str:
    """Make one thing wrong in a nest of dicts and lists; what."""
    place, key = "", None
    while key is None or (isinstance(tree[key], dict | list) and tree[key] and drawn.random() < 0.6):
        tree = tree if key is None else tree[key]
        key = drawn.choice(list(tree)) if isinstance(tree, dict) else drawn.randrange(len(tree))
        place += f"[{key!r}]"
    kind = drawn.random()
    if kind < 0.1:
        del tree[key]
        return f"{place[:200]} left out"
    if kind < 0.15 and isinstance(tree, dict):
        tree[drawn.choice(["", "é", "\0", "x" * 10**4, str(key) + "_"])] = tree[key]
        return f"{place[:200]} twice"
    if kind < 0.25:
        other = drawn.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        tree[key], tree[other] = tree[other], tree[key]
        return f"{place[:200]} and [{other!r:.100}] exchanged"
    number = drawn.randrange(len(values))
    tree[key] = values[number]()
    return f"{place[:200]} is value {number}, {tree[key]!r:.60}" if not isinstance(tree[key], torch.Tensor) else place


def spoil_text(content: bytes, drawn: random.Random) -> tuple[str, bytes]:
    """Make one thing wrong in the bytes of a file; what, and the bytes."""
    place = drawn.randrange(len(content))
    noise = drawn.choice(
        [b"\0", b"\xff\xfe", b"\x1b[2J", b"9" * 5000, b"[" * 10**4, b"{" * 10**4, b"\n\n", b'"', b",", b"-"]
    )
    kind = drawn.choice(["cut", "inserted", "replaced", "doubled"])
    changed = {
        "cut": content[:place],
        "inserted": content[:place] + noise + content[place:],
        "replaced": content[:place] + noise + content[place + len(noise) :],
        "doubled": content[:place] + content,
    }[kind]
    return f"{noise[:10]!r} {kind} at {place}", changed


# ------------------------------------------------------------------------------------------------ kinds of inputs
class Sources:
    """What the inputs are made from, in a directory that may be spoiled.

    train: a command line that begins a run; run: the directory of one that was stopped; image, coco: an image and a
    folder of annotated ones.
    """

    def __init__(self, train: list[str], run: str, image: str, coco: str):
        self.train, self.run, self.image, self.coco = train, Path(run), image, Path(coco)
        self.checkpoint = self.run / "checkpoint_last.pth"
        self.folder = Path.cwd()


def spoiled_checkpoints(command: Callable[[Sources, str], list[str]]) -> Callable[..., Iterator[Input]]:
    def make(drawn: random.Random, sources: Sources) -> Iterator[Input]:
        state, target = checkpoints.load(sources.checkpoint), sources.folder / "spoiled.pth"
        command_line = command(sources, str(target))
        while True:
            spoiled = copy.deepcopy(state)
            label = spoil(spoiled, drawn, VALUES + OBJECTS)
            target.write_bytes(hostile.with_our_digest(spoiled))
            yield label, target.name, command_line

    return make


def configs(drawn: random.Random, sources: Sources) -> Iterator[Input]:
    """Every setting, with a value of every kind."""
    target = sources.folder / "spoiled.yaml"
    names = sorted(build_parser(FLAGS).settings().keys() - WRITTEN - NEVER)
    while True:
        tree = {name: drawn.choice(VALUES)() for name in drawn.sample(names, drawn.choice([1, 1, 1, 2]))}
        target.write_text(yaml.safe_dump(tree, allow_unicode=False), errors="surrogatepass")
        yield f"{tree!r:.200}", "", [*sources.train, "--config", str(target)]


def kept_arguments(drawn: random.Random, sources: Sources) -> Iterator[Input]:
    """A run's own args.yaml, by whose flags it goes on."""
    target = sources.run / "args.yaml"
    whole = target.read_bytes()
    tree = yaml.safe_load(whole)
    main = sources.train[0]
    while True:
        spoiled = copy.deepcopy(tree)
        if drawn.random() < 0.3:
            label, content = spoil_text(whole, drawn)
        else:
            label = spoil(spoiled["args"] if drawn.random() < 0.8 else spoiled, drawn)
            content = yaml.safe_dump(spoiled).encode()
        target.write_bytes(content)
        yield label, "", [main, "--resume", str(sources.run), "--output-dir", str(sources.run), "--epochs", "3"]


def flags(parser: argparse.ArgumentParser, command: Callable[[Sources], list[str]]) -> Callable[..., Iterator[Input]]:
    """Every flag, with words of every kind."""
    actions = [action for action in parser._actions if action.option_strings and action.dest not in NEVER]

    def make(drawn: random.Random, sources: Sources) -> Iterator[Input]:
        while True:
            action = drawn.choice(actions)
            flag, word = drawn.choice(action.option_strings), drawn.choice(WORDS)
            if action.dest in WRITTEN and word.startswith(("/", ".")):
                continue
            if action.dest.endswith("kwargs"):
                names = "depth", "embed_dim", "num_heads", "mlp_ratio", "alpha", "drop_rate", "mixers", "fpn_channels"
                word = (
                    f"{drawn.choice(names)}={drawn.choice(['0', '-1', '[]', '{}', 'None', '1e300', 'x', '(1,)', word])}"
                )
            words = [flag, *[word] * drawn.choice([1, 1, 2])] if drawn.random() < 0.5 else [f"{flag}={word}"]
            yield f"{words!r:.200}", "", [*command(sources), *words]

    return make


def logs(drawn: random.Random, sources: Sources) -> Iterator[Input]:
    target = sources.run / "log.txt"
    whole = target.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    command = [*sources.train, "--output-dir", str(sources.run), "--resume", "auto"]
    while True:
        spoiled = copy.deepcopy(rows)
        if drawn.random() < 0.4:
            label, content = spoil_text(whole, drawn)
        else:
            label = spoil(spoiled, drawn)
            content = "".join(json.dumps(row) + "\n" for row in spoiled).encode()
        target.write_bytes(content)
        yield label, "log.txt", command


def label_maps(drawn: random.Random, sources: Sources) -> Iterator[Input]:
    target = sources.folder / "map.pt"
    good = torch.stack([torch.randn(MAP_SHAPE[1:]), torch.randint(0, 4, MAP_SHAPE[1:]).float()]).half()
    maps: tuple[Callable[[], Any], ...] = (
        lambda: good.to(drawn.choice([torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64, torch.float64])),
        lambda: good[..., : drawn.randrange(18)].clone(),
        lambda: good.to_sparse(),
        lambda: torch.quantize_per_tensor(good.float(), 0.1, 0, torch.quint8),
        lambda: good.float().requires_grad_(),
        lambda: torch.nn.Parameter(good.float()),
        lambda: torch.zeros(MAP_SHAPE, device="meta"),
        lambda: good.float() * drawn.choice([math.nan, math.inf, -1, 1e30, 0.5]),
        lambda: torch.zeros(1).expand(MAP_SHAPE),
        lambda: {"map": good},
        lambda: [good] * 3,
        lambda: drawn.choice(VALUES + OBJECTS)(),
    )
    while True:
        number = drawn.randrange(len(maps) + 3)
        content = hostile.saved(maps[number]() if number < len(maps) else good)
        label = f"map {number}"
        if number >= len(maps):
            label, content = spoil_text(content, drawn)
        target.write_bytes(content)
        yield label, target.name, lambda: read_label_map(target, 4)


def annotations(drawn: random.Random, sources: Sources) -> Iterator[Input]:
    whole = next((sources.coco / "annotations").glob("instances_train*")).read_bytes()
    folder, target = next(sources.coco.glob("train*")), sources.folder / "spoiled.json"
    tree = json.loads(whole)

    def read() -> None:
        found = CocoImages(target, folder, masks=True)
        for index in range(min(len(found), 2)):
            found.load(index)
        found.ground_truth()

    while True:
        spoiled = copy.deepcopy(tree)
        if drawn.random() < 0.2:
            label, content = spoil_text(whole, drawn)
        else:
            label = spoil(spoiled, drawn)
            content = json.dumps(spoiled).encode()
        target.write_bytes(content)
        yield label, "", read


def shards(drawn: random.Random, sources: Sources) -> Iterator[Input]:
    root = sources.folder / "shards"
    root.mkdir()
    picture = Path(sources.image).read_bytes()
    command = [*sources.train, "--data-set", "wds/", "--data-path", str(root)]
    while True:
        files = [(f"{i}.png", picture) for i in range(8)] + [(f"{i}.cls", str(i % 2).encode()) for i in range(8)]
        place = drawn.randrange(16)
        value = drawn.choice([*WORDS, *(json.dumps({"label": value()}) for value in VALUES)]).encode(
            errors="surrogateescape"
        )
        name = drawn.choice(
            [files[place][0], f"{place % 8}.json", "", "../x.png", "a\nb.png", "/etc/x.cls", f"{place}.jpg"]
        )
        files[place] = (name, value)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in files:
                entry = tarfile.TarInfo(name)
                entry.size, entry.type = len(content), drawn.choice([b"0"] * 30 + [b"1", b"2", b"5", b"6", b"x"])
                tar.addfile(entry, io.BytesIO(content))
        label, content = f"{files[place]!r:.100}", buffer.getvalue()
        if drawn.random() < 0.3:
            label, content = spoil_text(content, drawn)
        for path in root.iterdir():
            path.unlink()
        for split in ("train", "val"):
            (root / f"{split}-0.tar").write_bytes(content)
        if drawn.random() < 0.2:
            info = {"splits": {split: {"filenames": [f"{split}-0.tar"]} for split in ("train", "validation")}}
            label += spoil(info, drawn)
            (root / "_info.json").write_text(json.dumps(info))
        yield label, "", command


def pictures(drawn: random.Random, sources: Sources) -> Iterator[Input]:
    made = []
    for format in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO"):
        buffer = io.BytesIO()
        Image.open(sources.image).convert("RGB").resize((32, 32)).save(buffer, format)
        made.append((format, buffer.getvalue()))
    target = sources.folder / "picture.png"
    while True:
        format, content = drawn.choice(made)
        for _ in range(drawn.choice([1, 1, 3])):
            place = min(int(drawn.expovariate(0.02)), len(content) - 1)  # most of what can go wrong is in the head
            content = (
                content[:place]
                + drawn.choice([b"\xff", b"\0", b"\x7f\xff\xff\xff", drawn.randbytes(4)])
                + (content[place + drawn.choice([0, 1, 4]) :])
            )
        target.write_bytes(content)
        command = ["infer", "--model-path", str(sources.checkpoint), "--image", str(target)]
        yield f"{format} {content[:60]!r}", target.name, command


KINDS: dict[str, Callable[[random.Random, Sources], Iterator[Input]]] = {
    "fields of checkpoints, in prediction": spoiled_checkpoints(
        lambda sources, target: ["infer", "--model-path", target, "--image", sources.image]
    ),
    "fields of checkpoints, in resuming": spoiled_checkpoints(
        lambda sources, target: [*sources.train, "--resume", target]
    ),
    "fields of checkpoints, in fine-tuning": spoiled_checkpoints(
        lambda sources, target: [*sources.train, "--finetune", target]
    ),
    "settings of configs": configs,
    "fields of a run's args.yaml": kept_arguments,
    "rows of log.txt": logs,
    "flags of training": flags(build_parser(FLAGS), lambda sources: sources.train),
    "flags of detection": flags(
        build_parser(DETECTION_FLAGS),
        lambda sources: ["main_detection", *TINY_DETECTION, "--data-path", str(sources.coco)],
    ),
    "flags of infer.py": flags(
        infer.build_parser(),
        lambda sources: ["infer", "--model-path", str(sources.checkpoint), "--image", sources.image],
    ),
    "label maps": label_maps,
    "annotations": annotations,
    "shards": shards,
    "images": pictures,
}
