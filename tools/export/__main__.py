"""Write a checkpoint's model for other programs.

  --to safetensors FILE   weights and, as JSON, what prediction has to know
                          (arch, classes, normalisation); --half: in float16
  --to original FILE      weights with the names of the authors' code, .pth or
                          .safetensors
  --to hub DIR            Hugging Face's layout, for transformers and
                          timm.create_model("local-dir:DIR", pretrained=True);
                          --push REPO uploads it
  --to onnx FILE          a graph for any number of images, with --dynamic-size
                          of any size, checked against torch in onnxruntime; of
                          opset 18, which onnxruntime 1.18 or later reads,
                          without Fourier operators
  --to pt2 FILE           torch.export's program for any number of images, with
                          --compile AOTInductor's, for this CPU

The checkpoint is one of ours, the authors' or timm's. Images go into a graph as into the model: (B, 3, H, W),
float32, normalised by the mean and std that the file names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from runtime.entry_point import run_cli
from tools.command_line import ToolParser
from tools.export.graphs import write_onnx, write_pt2
from tools.export.hub import write_hub
from tools.export.weights import write_original, write_safetensors
from training.arguments import suggestion
from utils import UserError

FORMATS = {
    "safetensors": write_safetensors,
    "original": write_original,
    "hub": write_hub,
    "onnx": write_onnx,
    "pt2": write_pt2,
}
OPTIONS = {
    "half": "safetensors",
    "dynamic_size": "onnx",
    "compile": "pt2",
    "push": "hub",
}  # flag -> the format that it is for


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("export", __doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint of ours, the authors' or timm's")
    add("--to", nargs=2, required=True, metavar=("FORMAT", "PATH"), help="see above")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the averaged weights, or not (default: if there are any)",
    )
    add("--overwrite", action="store_true", help="replace what is at PATH")
    add("--half", action="store_true", help="safetensors: in float16")
    add("--dynamic-size", action="store_true", help="onnx: images of any size, multiples of the model's stride")
    add("--compile", action="store_true", help="pt2: by AOTInductor, which needs a C++ compiler")
    add("--push", metavar="REPO", help="hub: then upload it, by timm.models.push_to_hf_hub")
    args = parser.parse_args(argv)

    name, path = args.to
    if name not in FORMATS:
        raise UserError(f"--to {name}: choose one of {', '.join(FORMATS)}{suggestion(name, FORMATS)}")
    for option, only in OPTIONS.items():
        if getattr(args, option) and name != only:
            raise UserError(f"--{option.replace('_', '-')} is for --to {only}")
    args.path = Path(path)
    if not args.overwrite and (any(args.path.iterdir()) if args.path.is_dir() else args.path.exists()):
        raise UserError(f"{args.path}: it is there already; --overwrite replaces it")
    if name != "hub" and not args.path.parent.is_dir():
        raise UserError(f"{args.path}: there is no folder {args.path.parent}")
    print(f"{args.path}: written, {FORMATS[name](args)}")


if __name__ == "__main__":
    run_cli(main)
