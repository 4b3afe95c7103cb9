"""Measure models side by side: training step, inference, latency of one image, peak memory.

    python -m tools.benchmark svt_h_s plain:svt_h_s pvt_v2_b2
    python -m tools.benchmark --layers        mixers and wavelet transform alone
    python -m tools.benchmark --loader DIR    the input pipeline against timm's
    python -m tools.benchmark --detection svt_h_s resnet50 --batch-size 2
    python -m tools.benchmark --exactness DIR svt_h_s pvt_v2_b2 --dtype bfloat16
    python -m tools.benchmark --suite cuda --json FILE

A contender is any model of timm's registry, ours included, or "plain:NAME", our model in its plain
formulation (models/reference.py), or "onnx:NAME", in onnxruntime (--parts inference latency). Settings of its
own may follow, NAME@bfloat16,compile,channels-last, or float32, float16, eager, contiguous. The contenders of a
run take turns, A B A B ..., so that what else the machine does hits all alike; figures are medians over the
rounds, a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.entry_point import run_cli
from tools import machine
from tools.command_line import ToolParser
from training.arguments import POSITIVE, WORKERS
from utils import UserError, atomic_write

from .detection import compare_detectors
from .exactness import compare_exactness, exactness_table
from .layers import LAYER_GRIDS, compare_layers, layer_pairs, precision_pairs
from .loader import compare_loaders
from .models import PARTS, compare_models
from .settings import DTYPES, Settings
from .suites import SUITES
from .tables import LAYER_HEADING, model_table

COMMAND = "python -m tools.benchmark"
ROOT = Path(__file__).parents[2]


def build_parser() -> ToolParser:
    parser = ToolParser("benchmark", __doc__)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="[plain:|onnx:]NAME[@SETTING,...]")
    add("--layers", action="store_true", help="the mixers and the wavelet transform alone")
    add("--precisions", action="store_true", help="ways to compute the spectral mixers, beside float32 throughout")
    add("--loader", metavar="DIR", help="our input pipeline against timm's on DIR/val")
    add("--detection", action="store_true", help="Mask R-CNN over the models")
    add("--exactness", metavar="DIR", help="half precision against float32 and float64, on DIR/val")
    add("--steps", type=POSITIVE, default=50, help="of --exactness")
    suites = f"a set of runs, one after the other: {', '.join(SUITES)}"
    add("--suite", choices=SUITES, metavar="NAME", help=suites)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="to measure on")
    add("--dtype", choices=DTYPES, default="float32", help="of the arithmetic, not the weights")
    add("--compile", action="store_true", help="torch.compile")
    add("--channels-last", action="store_true", help="NHWC memory format")
    add("--batch-size", type=POSITIVE, default=16, help="images a step")
    add("--img-size", type=POSITIVE, default=224, help="side of the images, pixels")
    add("--rounds", type=POSITIVE, default=5, help="turns of each contender")
    parts = f"what to measure, of {', '.join(PARTS)} (default: the first four)"
    add("--parts", nargs="+", choices=PARTS, default=PARTS[:4], metavar="PART", help=parts)
    add("--grids", nargs="+", type=POSITIVE, default=LAYER_GRIDS, help="of --layers, --precisions (default: 7 to 128)")
    add("--channels", type=POSITIVE, default=64, help="of --layers and --precisions")
    add("--workers", type=WORKERS, default=2, help="of --loader")
    add("--threads", type=POSITIVE, default=torch.get_num_threads(), help="of the CPU")
    add("--json", type=Path, help="write all figures, with machine and versions, to this file")
    return parser


def run(args: argparse.Namespace) -> dict:
    """One run: its figures, printed and returned."""
    settings = Settings(args.device, args.dtype, args.compile, args.channels_last, args.batch_size, args.img_size)
    if args.layers or args.precisions:
        print(LAYER_HEADING)
        pairs = precision_pairs if args.precisions else layer_pairs
        return compare_layers(args.grids, args.channels, settings, args.rounds, pairs)
    if args.loader:
        result = compare_loaders(args.loader, settings, args.workers, args.rounds)
        figures = result["loader"]
        print("images/s: " + ", ".join(f"{who} {rate:.1f}" for who, rate in figures["images_per_s"].items()))
        print(f"ours / timm: {figures['ratio']:.2f}")
        return result
    if args.exactness:
        result = compare_exactness(args.models, args.exactness, settings, args.steps)
        print(exactness_table(result))
        return result
    if args.detection:
        result = compare_detectors(args.models, settings, args.rounds)
    else:
        result = compare_models(args.models, settings, args.rounds, args.parts)
    print(model_table(result))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if sum(map(bool, (args.models, args.layers, args.precisions, args.loader, args.suite))) != 1:
        parser.error("name models to measure, or one of --layers, --precisions, --loader and --suite")
    torch.set_num_threads(args.threads)
    if args.suite:
        return run_suite(args.suite, args.json)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    runs = [{"command": f"{COMMAND} {shlex.join(argv)}", **run(args)}]
    if args.json:
        write_report(args.json, {"machine": machine.describe(), "runs": runs})


def run_suite(name: str, path: Path | None) -> None:
    """Every run of a suite, each in a process of its own; SystemExit with the status of one that fails."""
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder, "run.json")
        for words in SUITES[name]:
            print(f"\n$ {COMMAND} {words}", flush=True)
            command = [sys.executable, "-m", "tools.benchmark", *shlex.split(words), "--json", str(one)]
            if status := subprocess.run(command, cwd=ROOT).returncode:
                raise SystemExit(status)
            report = json.loads(one.read_text())
            runs.append({**report["runs"][0], "command": f"{COMMAND} {words}"})
            if path:
                write_report(path, {"machine": report["machine"], "runs": runs})


def write_report(path: Path, report: dict) -> None:
    atomic_write(path, json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    run_cli(main)
