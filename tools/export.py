"""Export the model of a checkpoint to other formats.

  --to safetensors FILE   weights, with the metadata for prediction (arch,
                          classes, normalisation); --half: in float16
  --to original FILE      weights with the parameter names of the authors' code,
                          .pth or .safetensors
  --to hub DIR            Hugging Face's layout, for transformers and
                          timm.create_model("local-dir:DIR", pretrained=True);
                          `hf upload REPO DIR` uploads it
  --to onnx FILE          ONNX graph for any batch size (with --dynamic-size,
                          any image size), checked in onnxruntime; opset 18,
                          without Fourier operators
  --to pt2 FILE           torch.export program for any batch size

The checkpoint is a file from this project, the authors' code or timm, a run directory (its best checkpoint is
used), or the name of a model with bundled weights. Exported graphs take float32 images (B, 3, H, W), normalised
by the mean and std in the file's metadata.
"""

import argparse
import copy
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timm.models import save_for_hf
from timm.models._hub import generate_readme
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops import Permute

from models import LoadedModel, load_checkpoint
from models.base import ImageModel
from models.checkpoints import METADATA_KEYS, read_checkpoint, weights_of
from models.convert import to_original, to_ours
from models.layers import FeedForward
from models.pretrained import PREPROCESSING, find_checkpoint
from models.resampling import Grid
from runtime import checkpoints
from runtime.cli import run_cli
from training.arguments import Parser, suggestion
from training.model import count_parameters
from training.options import data_name
from utils import MachineError, UserError, atomic_write, cannot_write, make_directory, one_line

OPSET = 18  # understood by TensorRT, CoreML's converters and onnxruntime 1.18
TOLERANCE = 1e-4  # of a logit
LARGEST_SIDE = 4096  # pixels, of images of any size
BATCHES = (1, 3)  # sizes that a graph is checked with; it is traced with another
OPTIONS = {"half": "safetensors", "dynamic_size": "onnx"}  # flag -> its format


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m tools.export")
    add = parser.add_argument
    add("checkpoint", help="checkpoint, run directory (its best checkpoint), or name of a bundled model")
    add("--to", nargs=2, required=True, metavar=("FORMAT", "PATH"), help="format and output path, see above")
    averaged = "export the averaged weights (default: if the checkpoint has them)"
    add("--ema", action=argparse.BooleanOptionalAction, default=None, help=averaged)
    add("--overwrite", action="store_true", help="overwrite PATH")
    add("--half", action="store_true", help="safetensors: write float16")
    add("--dynamic-size", action="store_true", help="onnx: any image size that is a multiple of the model's stride")
    args = parser.parse_args(argv)

    name, path = args.to[0], Path(args.to[1])
    if name not in FORMATS:
        raise UserError(f"--to {name}: choose one of {', '.join(FORMATS)}{suggestion(name, FORMATS)}")
    for option, only in OPTIONS.items():
        if getattr(args, option) and name != only:
            raise UserError(f"--{option.replace('_', '-')} is for --to {only}")
    if path.exists() and not args.overwrite:
        raise UserError(f"{path}: it exists already; --overwrite replaces it")
    make_directory(path if name == "hub" else path.parent)
    print(f"{path}: written, {FORMATS[name](args, path)}")


# ------------------------------------------------------------------------------------------------------------ weights


def write_safetensors(args: argparse.Namespace, path: Path) -> str:
    """The weights and what prediction needs."""
    state, tensors = read_weights(args)
    if args.half:
        tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        if beyond := [name for name, tensor in tensors.items() if tensor.isinf().any()]:
            raise UserError(f"--half: {beyond[0]} of {args.checkpoint} has numbers beyond float16's range")
    return write_tensors(path, tensors, state)


def write_original(args: argparse.Namespace, path: Path) -> str:
    """The weights under the names of the authors' code."""
    state, tensors = read_weights(args)
    arch = state.get("arch", "svt")
    if not arch.startswith(("spectformer", "svt")):
        raise UserError(f"{args.checkpoint}: it is a {arch}, which the authors' code does not have")
    return write_tensors(path, to_original(to_ours(tensors)), state)


def read_weights(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what is in the checkpoint, its weights)."""
    path = find_checkpoint(args.checkpoint)
    state = read_checkpoint(path)
    return state, weights_of(state, args.ema, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    if path.suffix == ".safetensors":
        checkpoints.save_safetensors(path, tensors, state)
    else:
        checkpoints.save(path, {"model": tensors})
    return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} numbers"


# ---------------------------------------------------------------------------------------------------------------- hub

# Keys of timm's `pretrained_cfg` that describe the model and not the registered weights.
MODEL_KEYS = ("architecture", "input_size", "fixed_input_size", "num_classes", "pool_size", "first_conv", "classifier")
# Settings of a run that a model card has.
RECIPE = (
    *("epochs", "batch_size", "accum_iter", "opt", "momentum", "lr", "unscale_lr", "sched", "min_lr", "warmup_lr"),
    *("warmup_epochs", "warmup_updates", "weight_decay", "layer_decay", "clip_grad", "drop", "drop_path", "smoothing"),
    *("bce_loss", "class_weights", "balanced_sampling", "token_label", "scale", "ratio", "hflip", "vflip", "aa"),
    *("color_jitter", "mixup", "cutmix", "reprob", "seed"),
)
AUTHORS = {
    "arXiv:2304.06446": "Patro, Badri N. and Namboodiri, Vinay P. and Agneeswaran, Vijay Srinivas",
    "arXiv:2311.01310": "Patro, Badri N. and Agneeswaran, Vijay Srinivas",
}
BIBTEX = """@article{{{id},
  title={{{paper_name}}},
  author={{{authors}}},
  journal={{arXiv preprint {paper_ids}}},
  year={{20{id:.2}}}
}}"""
USAGE = """
```python
import timm
import spectformer_svt  # registers the models; pip install . in a clone of their repository

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()  # "hf-hub:REPO" where it was uploaded
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
"""


def write_hub(args: argparse.Namespace, path: Path) -> str:
    """config.json, model.safetensors and README.md in a folder."""
    info = load_checkpoint(args.checkpoint, ema=args.ema)
    cfg, kwargs = info.model.pretrained_cfg, dict(info.model_kwargs)
    if cfg.get("fixed_input_size"):
        kwargs["img_size"] = info.input_size
    info.model.pretrained_cfg = {key: cfg[key] for key in MODEL_KEYS if key in cfg}
    images = {name: getattr(info, name) for name in PREPROCESSING} | {"input_size": (3, *info.input_size)}
    described = {"label_names": info.class_names, "pretrained_cfg": images}
    try:
        save_for_hf(info.model, path, model_config=described, model_args=kwargs, safe_serialization=True)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config["model_args"].pop("num_classes", None)  # beside the entry of that name, transformers would pass both
        (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        (path / "README.md").write_text(model_card(info, cfg, path), encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error
    return "config.json, model.safetensors, README.md"


def model_card(info: LoadedModel, cfg: Mapping[str, Any], folder: Path) -> str:
    """README.md: what the checkpoint says of its run, and the paper of its architecture in timm's `cfg`."""
    settings, (height, width) = info.checkpoint.get("args") or {}, info.input_size
    data = data_name(settings["data_set"], settings.get("data_path")) if "data_set" in settings else None
    paper = cfg.get("paper_ids", "")
    number = paper.removeprefix("arXiv:")
    details: dict[str, Any] = {
        "Model": f"{info.arch}, {count_parameters(info.model):,} parameters, {info.num_classes} classes",
        "Images": f"{height} x {width}, mean {list(info.mean)}, std {list(info.std)}, crop {info.crop_pct:g}, "
        f"{info.interpolation}",
        "Arguments": {name: f"`{value!r}`" for name, value in info.model_kwargs.items()},
        "Data": data,
        "Accuracy": accuracy(info.checkpoint, info.ema),
        "Began from": settings.get("finetune") and Path(settings["finetune"]).name,
        "Recipe": {name: settings[name] for name in RECIPE if settings.get(name) is not None},
        "Paper": paper and f"https://arxiv.org/abs/{number}",
    }
    card: dict[str, Any] = {
        "license": "unknown",
        "description": f"A {info.arch} for image classification" + (f", trained on {data}." if data else "."),
        "details": {name: value for name, value in details.items() if value},
        "usage": USAGE.format(folder=folder),
    }
    if paper in AUTHORS:
        card["citation"] = BIBTEX.format(**cfg, id=number, authors=AUTHORS[paper])
    return generate_readme(card, folder.name)


def accuracy(state: Mapping[str, Any], ema: bool) -> str | None:
    """The top-1 after the checkpoint's epoch, if it is that of the exported weights and not of their average."""
    if not state.get("acc1") or not state.get("epoch") or state.get("step") or state.get("averaged", False) != ema:
        return None
    return f"{state['acc1']:.2f} % top-1 on the validation images, after epoch {state['epoch']}"


# ------------------------------------------------------------------------------------------------------------- graphs


def write_onnx(args: argparse.Namespace, path: Path) -> str:
    """An ONNX file, after onnxruntime has given torch's logits with it."""
    kwargs = {"dynamic_img_size": True} if args.dynamic_size else {}
    info = load_checkpoint(args.checkpoint, ema=args.ema, model_kwargs=kwargs)
    size, sizes, shape = info.input_size, [info.input_size], {0: Dim("batch")}
    if args.dynamic_size:
        if not isinstance(info.model, ImageModel):
            raise UserError(f"--dynamic-size: {info.arch} is not one of this project's models")
        stride = info.model.feature_info[-1]["reduction"]
        rows, columns = (Dim(name, min=2, max=LARGEST_SIDE // stride) for name in ("rows", "columns"))
        shape |= {2: stride * rows, 3: stride * columns}
        native = tuple(max(side // stride, 2) * stride for side in info.input_size)
        sizes = [(2 * stride, 3 * stride), (5 * stride, 4 * stride), native]
        size = (native[0] + stride, native[1] + 2 * stride)  # where weights are resampled, so that the graph does it
    proto = to_onnx(export(portable(info.model), size, shape))
    package("onnx").helper.set_model_props(proto, metadata(info))
    content = proto.SerializeToString()
    difference = check(onnxruntime_forward(content), info.model, sizes)
    atomic_write(path, content)
    return (
        f"opset {OPSET}, {len(content) / 1e6:.1f} MB, any number of images{' of any size' * args.dynamic_size}; "
        f"onnxruntime's logits within {difference:.1e} of torch's"
    )


def write_pt2(args: argparse.Namespace, path: Path) -> str:
    """A program of torch.export's, after it has given the model's logits."""
    info = load_checkpoint(args.checkpoint, ema=args.ema)
    program = export(info.model, info.input_size, {0: Dim("batch")})
    difference = check(program.module(), info.model, [info.input_size])
    extra = {"model.json": json.dumps(metadata(info))}
    atomic_write(path, lambda file: torch.export.save(program, file, extra_files=extra))
    return f"torch {torch.__version__}; its logits within {difference:.1e} of the model's"


FORMATS = {
    "safetensors": write_safetensors,
    "original": write_original,
    "hub": write_hub,
    "onnx": write_onnx,
    "pt2": write_pt2,
}


def in_onnxruntime(model: nn.Module, img_size: int) -> Callable[[Tensor], Tensor]:
    """The model's logits by onnxruntime."""
    program = export(portable(model.eval()), (img_size, img_size), {0: Dim("batch")})
    return onnxruntime_forward(to_onnx(program).SerializeToString())


def onnxruntime_forward(content: bytes) -> Callable[[Tensor], Tensor]:
    """From images to logits by an ONNX file, on the CPU, with as many threads as torch uses."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def export(model: nn.Module, size: Grid, shape: dict[int, Any]) -> ExportedProgram:
    """The model's graph for images of (height, width); `shape` says which of their axes are dynamic."""
    images = torch.zeros(2, 3, *size)
    return torch.export.export(
        model, (images,), dynamic_shapes=(shape,), prefer_deferred_runtime_asserts_over_guards=True
    )


def to_onnx(program: ExportedProgram) -> Any:
    """The program's graph as onnx.ModelProto, from `images` to `logits`."""
    operators = package("onnxscript").opset18

    # The exporter's own treats a dynamic size as a number.
    def remainder(x, divisor):
        return operators.Mod(x, operators.CastLike(divisor, x))

    # The exporter's own has another order, in which onnxruntime does not recognise GELU, a single operation there.
    def gelu(x, approximate="none"):
        half, one, root = (operators.CastLike(number, x) for number in (0.5, 1.0, math.sqrt(2)))
        return operators.Mul(operators.Mul(x, operators.Add(operators.Erf(operators.Div(x, root)), one)), half)

    proto = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        external_data=False,
        verbose=False,
        custom_translation_table={torch.ops.aten.remainder.Scalar: remainder, torch.ops.aten.gelu.default: gelu},
    ).model_proto
    # PyTorch expands one matrix to a batch of copies before it multiplies; ONNX can broadcast the matrix itself.
    matrices = {matrix.name for matrix in proto.graph.initializer if len(matrix.dims) == 2 and min(matrix.dims) > 1}
    copies = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Expand"}
    for node in proto.graph.node:
        if node.op_type == "MatMul" and copies.get(node.input[0]) in matrices:
            node.input[0] = copies[node.input[0]]
    return proto


@torch.no_grad()
def check(run: Callable[[Tensor], Tensor], model: nn.Module, sizes: list[Grid]) -> float:
    """The largest difference between a graph's logits and the model's; raises MachineError where it is too large."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, 3, *size, generator=generator) for size in sizes for batch in BATCHES]
    difference = max((run(images) - model(images)).abs().max().item() for images in batches)
    if not difference <= TOLERANCE:
        raise MachineError(f"the graph's logits differ from the model's by {difference:.1e}; nothing was written")
    return difference


def metadata(info: LoadedModel) -> dict[str, str]:
    """What prediction needs, as JSON by name."""
    found = {key: getattr(info, key) for key in METADATA_KEYS}
    return {key: json.dumps(value) for key, value in found.items() if value is not None}


def package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"ONNX needs pip install onnx onnxruntime onnxscript: {one_line(error)}") from error


# ------------------------------------------------------------------------------- layers that other runtimes run fast


def portable(model: nn.Module) -> nn.Module:
    """A copy of the model that ONNX runtimes run faster; its logits differ by rounding alone.

    Feed-forward networks with a depthwise convolution, (B, H, W, C) to (B, H, W, C), become convolutions throughout. A
    runtime that stores images as (B, C, H, W) then transposes the grid, and not the wider hidden one.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, FeedForward) and module.dwconv is not None:
            layers = [pointwise(module.fc1), module.dwconv, module.act, pointwise(module.fc2)]
            model.set_submodule(name, nn.Sequential(Permute([0, 3, 1, 2]), *layers, Permute([0, 2, 3, 1])))
    return model


def pointwise(linear: nn.Linear) -> nn.Conv2d:
    layer = nn.Conv2d(linear.in_features, linear.out_features, 1)
    layer.weight, layer.bias = nn.Parameter(linear.weight[..., None, None]), linear.bias
    return layer


if __name__ == "__main__":
    run_cli(main)
