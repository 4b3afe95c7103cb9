"""Checkpoints, configs and command lines with one thing wrong, drawn from seeds."""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import torch

from runtime import checkpoints as checkpoint_files
from training.arguments import class_list
from training.classification_flags import FLAGS
from training.options import build_parser

State = dict[str, Any]
NOT_NUMBERS = ("three", None, [1], {}, float("nan"), True)
NOT_DICTS = ("text", [1, 2], 7, None)


# -------------------------------------------------------------------------------------- single wrongs
def drop_tensor(state: State, drawn: random.Random, key: str) -> str:
    name = drawn.choice(list(state[key]))
    del state[key][name]
    return f"{key} without {name}"


def rename_tensor(state: State, drawn: random.Random, key: str) -> str:
    name = drawn.choice(list(state[key]))
    new = drawn.choice([name + "_", name.upper(), "x." + name, name[:-1], "é" + name, ""])
    state[key][new] = state[key].pop(name)
    return f"{key}: {name} called {new!r}"


def reshape_tensor(state: State, drawn: random.Random, key: str) -> str:
    # What depends on the grid is resampled from any, by design.
    name = drawn.choice([name for name in state[key] if "complex_weight" not in name and name != "pos_embed"])
    tensor = state[key][name]
    shape = drawn.choice(
        [
            lambda: tensor[None],
            lambda: tensor[:-1],
            lambda: tensor.new_zeros(0),
            lambda: torch.cat([tensor, tensor]),
            lambda: tensor.flatten()[0],
        ]
    )
    state[key][name] = shape().clone()
    return f"{key}: {name} of shape {tuple(state[key][name].shape)}"


def not_a_tensor(state: State, drawn: random.Random, key: str) -> str:
    name = drawn.choice(list(state[key]))
    state[key][name] = drawn.choice(["text", 1, None, [1.0], {}, {"a": torch.zeros(1)}])
    return f"{key}: {name} is {state[key][name]!r}"


def empty(state: State, drawn: random.Random, key: str) -> str:
    state[key] = drawn.choice([{}, *NOT_DICTS])
    return f"{key} is {state[key]!r}"


def remove(state: State, drawn: random.Random, *keys: str) -> str:
    key = drawn.choice(keys)
    del state[key]
    return f"without {key}"


def replace(state: State, drawn: random.Random, wrong: dict[str, tuple]) -> str:
    key = drawn.choice(sorted(wrong))
    state[key] = drawn.choice(wrong[key])
    return f"{key} is {state[key]!r}"


def spoil_optimizer(state: State, drawn: random.Random) -> str:
    optimizer = state["optimizer"]
    number = drawn.choice(list(optimizer["state"]))
    entry = optimizer["state"][number]
    group = drawn.choice(optimizer["param_groups"])

    def odd_shape() -> None:
        entry["exp_avg"] = drawn.choice([torch.zeros(3, 5, 7), entry["exp_avg"][None], torch.zeros(0)])

    spoilers: dict[str, Callable[[], Any]] = {
        "without state": lambda: optimizer.pop("state"),
        "without groups": lambda: optimizer.pop("param_groups"),
        "a state of other shape": odd_shape,
        "a state that is text": lambda: entry.update(exp_avg_sq="text"),
        "a state without its average": lambda: entry.pop("exp_avg"),
        "a group less": lambda: optimizer["param_groups"].pop(),
        "a group without weights": lambda: group.update(params=[]),
        "groups that are text": lambda: optimizer.update(param_groups="text"),
        "a state that is a list": lambda: optimizer.update(state=[1, 2]),
        "a rate that is text": lambda: group.update(lr="fast"),
        "betas that are text": lambda: group.update(betas="ab"),
        "a group without betas": lambda: group.pop("betas"),
    }
    name = drawn.choice(sorted(spoilers))
    spoilers[name]()
    return f"optimizer: {name}"


def spoil_args(state: State, drawn: random.Random) -> str:
    key = drawn.choice(["batch_size", "accum_iter", "opt"])
    if drawn.random() < 0.3:
        del state["args"][key]
        return f"args without {key}"
    state["args"][key] = drawn.choice(["text", None, [1], -1, 0] if key != "opt" else [None, 3, [1], "sgd"])
    return f"args: {key} is {state['args'][key]!r}"


def spoil_meters(state: State, drawn: random.Random) -> str:
    key = drawn.choice(list(state["meters"]))
    if drawn.random() < 0.5:
        del state["meters"][key]
        return f"meters without {key}"
    state["meters"][key] = drawn.choice(["text", None, [1.0], {}])
    return f"meters: {key} is {state['meters'][key]!r}"


def without_head(state: State) -> State:
    """The tensors that --classifier new needs of a file; the others may be anything."""
    state["model_ema"] = {name: value for name, value in state["model_ema"].items() if not name.startswith("head")}
    return state


TENSORS = (drop_tensor, rename_tensor, reshape_tensor, not_a_tensor, empty)
# What every place that reads a checkpoint depends on: the wrongs that it has to refuse.
RESUMED = [
    *[lambda s, d, f=f: f(s, d, "model") for f in TENSORS],
    *[lambda s, d, f=f: f(s, d, "model_ema") for f in TENSORS],
    *[spoil_optimizer] * 6,
    spoil_args,
    spoil_args,
    spoil_meters,
    lambda s, d: remove(
        s,
        d,
        "model",
        "optimizer",
        "model_ema",
        "args",
        "world_size",
        "epoch",
        "step",
        "updates",
        "meters",
        "best_acc1",
        "best_epoch",
        "arch",
        "model_kwargs",
        "num_classes",
        "input_size",
    ),
    lambda s, d: replace(
        s,
        d,
        {
            "epoch": (*NOT_NUMBERS, -1, 1.5),
            "step": (*NOT_NUMBERS, -1, 1.5, 10**6),
            "updates": (*NOT_NUMBERS, -1),
            "world_size": (*NOT_NUMBERS, 0, -1),
            "best_acc1": ("high", None, [1], {}),
            "best_epoch": ("a", None, -7, [1]),
            "meters": NOT_DICTS,
            "args": NOT_DICTS,
            "optimizer": (*NOT_DICTS, {}),
            "arch": ("svt_h_s", "", 7, None),
            "num_classes": (5, 0, -4, "four", None),
            "input_size": ([64, 64], [32], "32", None, 32.5),
            "model_kwargs": ({}, {"depth": 3}, "depth=2", None),
        },
    ),
]
INFERRED = [
    *[lambda s, d, f=f: f(s, d, "model_ema") for f in TENSORS[:-1]],
    lambda s, d: replace(
        s,
        d,
        {
            "arch": ("", "no_such_model", "resnet18", "svt_h_s", 7),
            "num_classes": (5, -4, "four", 10**12, 1.5),
            "model_kwargs": (
                {"depth": 3},
                {"bogus": 1},
                {"embed_dim": -8},
                {"depth": "two"},
                {"embed_dim": 0},
                "x",
                [1],
                {"num_heads": 5},
                {"embed_dim": None},
                {1: 2},
            ),
            "input_size": ([0, 0], [-32, 32], [32], "32", [32, 32, 32], 32.5, [1.5, 2], [10**9, 10**9]),
            "mean": ([0.5], [0.5, 0.5], ["a", "b", "c"], "abc", 5, {}, [0.1] * 4),
            "std": ([0.5], ["a", "b", "c"], 5, [0.1] * 4, [0.0, 0.0, 0.0]),
            "crop_pct": ("x", -1, float("nan"), [1], 1e9),
            "interpolation": ("bogus", 5, "", [1]),
            "class_names": (["a"], ["a"] * 5, "abcd", 5),
        },
    ),
]
FINETUNED = [
    *[lambda s, d, f=f: f(without_head(s), d, "model_ema") for f in TENSORS[:-1]],
    lambda s, d: replace(s, d, {"class_names": ("abcd", 5, {}), "model_ema": ("text", 7, [1])}),
]


def checkpoints(kind: str, number: int, source: Path, target: Path) -> Iterator[str]:
    """Write to ``target`` one spoiled checkpoint after the other; what is wrong with each.

    ``kind``: "resume", "infer", "finetune" change ``source``'s content and give it a digest that holds, so
    that only the content tells; "bytes" changes bytes.
    """
    drawn = random.Random(f"mutated {kind}")
    content = source.read_bytes()
    state = None if kind == "bytes" else checkpoint_files.load(source)
    table = {"resume": RESUMED, "infer": INFERRED, "finetune": FINETUNED}.get(kind, [])
    for _ in range(number):
        if state is None:
            yield spoil_bytes(content, drawn, target)
            continue
        spoiled = copy.deepcopy(state)
        label = drawn.choice(table)(spoiled, drawn)
        target.write_bytes(hostile.with_our_digest(spoiled))
        yield label


def spoil_bytes(content: bytes, drawn: random.Random, target: Path) -> str:
    place, length = drawn.randrange(len(content)), drawn.choice([1, 4, 64])
    kind = drawn.choice(["changed", "removed", "inserted", "cut", "moved"])
    noise = drawn.randbytes(length)
    changed = {
        "changed": content[:place] + noise + content[place + length :],
        "removed": content[:place] + content[place + length :],
        "inserted": content[:place] + noise + content[place:],
        "cut": content[:place],
        "moved": content[place:] + content[:place],
    }[kind]
    target.write_bytes(changed)
    return f"{length} bytes {kind} at {place}"


# -------------------------------------------------------------------------- configs and command lines
def command_lines(number: int, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(what the message has to name, arguments) of command lines and configs with one mistake."""
    drawn = random.Random("command lines")
    actions = [
        action
        for action in build_parser(FLAGS)._actions
        if action.option_strings and action.dest not in ("help", "config")
    ]
    makers = [
        bad_value,
        unknown_flag,
        missing_value,
        bad_config_value,
        bad_config_value,
        unknown_key,
        broken_config,
        contradiction,
    ]
    for i in range(number):
        yield drawn.choice(makers)(drawn, actions, folder / f"config{i}.yaml")


def takes_any_text(action: argparse.Action) -> bool:
    return action.type is None and action.choices is None and action.nargs != 0


def bad_value(drawn: random.Random, actions: list, path: Path) -> tuple[str, list[str]]:
    action = drawn.choice([a for a in actions if not takes_any_text(a) and a.nargs != 0])
    flag = drawn.choice(action.option_strings)
    wrong = drawn.choice(
        ["bogus", "", "1e", "0x10", "½", "1,5"]
        if action.choices is not None or action.type is None
        else ["bogus", "", "nan", "inf", "-7", "1e", "½", "1,5", "--"]
    )
    words = [wrong] * (action.nargs if isinstance(action.nargs, int) else 1)
    return flag.removeprefix("--no-"), [flag, *words]


def unknown_flag(drawn: random.Random, actions: list, path: Path) -> tuple[str, list[str]]:
    flag = drawn.choice(actions).option_strings[0]
    place = drawn.randrange(2, len(flag))
    wrong = drawn.choice(
        [flag + "x", flag[:place] + "q" + flag[place + 1 :], "--" + flag[3:] + "z", "-" + flag[2:] + "z"]
    )
    known = {string for action in actions for string in action.option_strings}
    return (wrong, [wrong, "1"]) if wrong not in known else unknown_flag(drawn, actions, path)


def missing_value(drawn: random.Random, actions: list, path: Path) -> tuple[str, list[str]]:
    action = drawn.choice([a for a in actions if a.nargs not in (0, "*", "?")])
    flag = drawn.choice(action.option_strings)
    return flag, [flag]


def bad_config_value(drawn: random.Random, actions: list, path: Path) -> tuple[str, list[str]]:
    action = drawn.choice([action for action in actions if action.type is not class_list])  # of any names, or any list
    if takes_any_text(action) and action.nargs != "*":
        wrong = drawn.choice(["[a, b]", "{a: b}", "5", "true", "2020-01-01"])
    elif action.nargs == "*":
        wrong = drawn.choice(["[a, b]", "text", "5", "{1: 2}"])
    else:
        wrong = drawn.choice(["[a, b, c]", "{a: b}", "bogus", "2020-01-01", "[[]]"])
    key = drawn.choice([action.dest, action.dest.replace("_", "-")])
    path.write_text(f"{key}: {wrong}\n")
    return f"{path.name}", ["--config", str(path)]


def unknown_key(drawn: random.Random, actions: list, path: Path) -> tuple[str, list[str]]:
    key = drawn.choice(actions).dest + drawn.choice(["s", "_", "x", "!"])
    path.write_text(f"{key}: 1\n")
    return key, ["--config", str(path)]


def broken_config(drawn: random.Random, actions: list, path: Path) -> tuple[str, list[str]]:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    content = drawn.choice(
        [
            b"",
            b"just text",
            b"- a\n- b\n",
            b"a: [1, 2",
            b"a: b: c",
            b"\tepochs: 3\n",
            b"\xff\xfe\x00bad",
            b"epochs: *none\n",
            b"!!python/object/apply:os.system ['true']\n",
            b"epochs: !!binary abc\n",
            b"? [a]\n: 1\n",
            b"epochs: 3\n---\nlr: 1\n",
            b"\x00",
            b"[" * 5000,
            laughs.encode(),
            (laughs + "epochs: *a39\n").encode(),
            b"epochs: " + b"9" * 5000,
            drawn.randbytes(200),
            None,
        ]
    )
    if content is None:
        return path.name, ["--config", str(path)]
    path.write_bytes(content)
    return path.name, ["--config", str(path)]


def contradiction(drawn: random.Random, actions: list, path: Path) -> tuple[str, list[str]]:
    file = path.with_suffix(".txt")
    file.write_text("not a checkpoint")
    return drawn.choice(
        [
            ("--arch", ["--arch", "spectformer_xxl"]),
            ("--arch", ["--arch", ""]),
            ("bogus", ["--model-kwargs", "bogus=1"]),
            ("depth", ["--model-kwargs", "depth=-1"]),
            ("embed_dim", ["--model-kwargs", "embed_dim=-7"]),
            ("--model-kwargs", ["--model-kwargs", "depth"]),
            ("--data-path", ["--data-path", str(path.with_name("none"))]),
            ("--data-set", ["--data-set", "MNIST"]),
            ("--data-path", ["--data-set", "IMNET", "--data-path", str(file)]),
            (file.name, ["--output-dir", str(file)]),
            (file.name, ["--output-dir", str(file / "below")]),
            (file.name, ["--resume", str(file)]),
            (file.name, ["--finetune", str(file)]),
            ("none.pth", ["--resume", "none.pth"]),
            ("--resume", ["--eval"]),
            ("--batch-size", ["--batch-size", "7"]),
            ("--batch-size", ["--batch-size", "4096"]),
            ("--opt", ["--opt", "bogus"]),
            ("--device", ["--device", "tpu"]),
            ("--device", ["--device", "cuda:99"]),
            ("--token-label-data", ["--token-label", "--mixup", "0", "--cutmix", "0"]),
            ("--mixup", ["--token-label", "--token-label-data", "x", "--mixup", "1"]),
            ("--teacher-model", ["--distillation-type", "soft"]),
            ("teacher", ["--teacher-model", "resnet18"]),
            ("--amp", ["--dtype", "float64", "--amp", "bf16"]),
            ("--cutmix-minmax", ["--cutmix-minmax", "0.9", "0.1"]),
            ("--warmup-epochs", ["--warmup-epochs", "1.5"]),
            ("--aa", ["--aa", "bogus"]),
            ("--classes", ["--classes", "0,0"]),
            ("--classes", ["--classes", "none,such"]),
            ("--freeze-at", ["--freeze-at", "99"]),
            ("--input-size", ["--input-size", "32x"]),
            ("stray", ["stray"]),
            ("-x", ["-x"]),
            ("--aa", ["--aa", "rand-mx"]),
        ]
    )
