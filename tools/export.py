"""Export the model of a checkpoint to other formats.

  --to safetensors FILE   weights, with the metadata for prediction (arch,
                          classes, normalisation); --half: in float16
  --to original FILE      weights with the parameter names of the authors' code,
                          .pth or .safetensors
  --to hub DIR            Hugging Face's layout, for transformers and
                          timm.create_model("local-dir:DIR", pretrained=True);
                          `hf upload REPO DIR` uploads it
  --to onnx FILE          ONNX graph for any batch size (with --dynamic-size,
                          any image size); opset 18, no Fourier operators
  --to pt2 FILE           torch.export program for any batch size

The checkpoint is a file from this project, the authors' code or timm, a run directory (its best checkpoint is
used), or the name of a model with bundled weights. Exported graphs take float32 images (B, C, H, W), normalised
by the mean and std in the file's metadata. They are only written if their logits match the model's.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
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
from models.pretrained import PREPROCESSING, check_model, find_checkpoint, model_name
from runtime import checkpoints
from runtime.cli import run_cli
from training.arguments import Parser, suggestion
from training.model import count_parameters
from training.options import data_name
from utils import MachineError, UserError, atomic_write, make_directory, one_line

OPSET = 18  # supported by TensorRT, CoreML's converters and onnxruntime 1.18
TOLERANCE = 1e-4  # largest allowed difference of a logit
LARGEST_SIDE = 4096  # pixels, with --dynamic-size
BATCHES = (1, 3)  # batch sizes for checking a graph; tracing uses 2
ANY_BATCH = {0: Dim("batch")}  # the dynamic axis of a graph's images
Shape = tuple[int, int, int]  # of an image (C, H, W)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m tools.export")
    add = parser.add_argument
    add("checkpoint", help="checkpoint, run directory (its best checkpoint), or name of a bundled model")
    add("--to", nargs=2, required=True, metavar=("FORMAT", "PATH"), help="format and output path, see above")
    add("--arch", metavar="NAME", help="model name, if the checkpoint does not contain it")
    averaged = "export the averaged weights (default: if the checkpoint has them)"
    add("--ema", action=argparse.BooleanOptionalAction, default=None, help=averaged)
    add("--overwrite", action="store_true", help="overwrite PATH")
    add("--half", action="store_true", help="safetensors: write float16")
    add("--dynamic-size", action="store_true", help="onnx: any image size that is a multiple of the model's stride")
    args = parser.parse_args(argv)

    name, path = args.to[0], Path(args.to[1])
    if name not in FORMATS:
        raise UserError(f"--to {name}: choose one of {', '.join(FORMATS)}{suggestion(name, FORMATS)}")
    if name == "safetensors" and path.suffix != ".safetensors":
        raise UserError(f"--to safetensors {path}: the name must end in .safetensors")
    if args.half and name != "safetensors":
        raise UserError("--half is for --to safetensors")
    if args.dynamic_size and name != "onnx":
        raise UserError("--dynamic-size is for --to onnx")
    if path.exists() and not args.overwrite:
        raise UserError(f"{path}: already exists; use --overwrite to replace it")
    make_directory(path if name == "hub" else path.parent)
    try:
        print(f"{path}: written, {FORMATS[name](args, path)}")
    except ImportError as error:
        raise UserError(f"--to onnx: run pip install onnx onnxruntime onnxscript ({one_line(error)})") from error


# ------------------------------------------------------------------------------------------------------------ weights


def write_weights(args: argparse.Namespace, path: Path) -> str:
    """Write the weights, for --to original under their names in the authors' code; .safetensors have metadata."""
    source = find_checkpoint(args.checkpoint)
    state = read_checkpoint(source)
    weights = weights_of(state, args.ema, source)
    arch = state.get("arch")
    if args.arch:
        arch = model_name(state, args.arch, source)
        check_model(arch)
    if args.to[0] == "original":
        weights = to_original(to_ours(weights))
    if args.half:
        weights = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
        if overflows := [name for name, weight in weights.items() if weight.isinf().any()]:
            raise UserError(f"--half: {overflows[0]} of {source} exceeds the range of float16")
    if path.suffix == ".safetensors":
        checkpoints.save_safetensors(path, weights, state | {"arch": arch})
    else:
        checkpoints.save(path, {"model": weights})
    return f"{len(weights)} tensors"


# ---------------------------------------------------------------------------------------------------------------- hub

# Keys of timm's `pretrained_cfg` that describe the model, not its pretrained weights.
MODEL_KEYS = ("architecture", "input_size", "fixed_input_size", "num_classes", "pool_size", "first_conv", "classifier")
USAGE = """
```python
import timm
import spectformer_svt  # registers the models; install it with `pip install .` in a clone of the repository

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()  # after uploading: "hf-hub:REPO"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
"""


def write_hub(args: argparse.Namespace, path: Path) -> str:
    """Write config.json, model.safetensors and README.md to a folder."""
    info = load_checkpoint(args.checkpoint, args.arch, ema=args.ema)
    cfg, kwargs = info.model.pretrained_cfg, dict(info.model_kwargs)
    if cfg.get("fixed_input_size"):
        kwargs["img_size"] = info.input_size
    info.model.pretrained_cfg = {key: cfg[key] for key in MODEL_KEYS if key in cfg}
    images = {name: getattr(info, name) for name in PREPROCESSING} | {"input_size": image_shape(info)}
    described = {"label_names": info.class_names, "pretrained_cfg": images}
    save_for_hf(info.model, path, model_config=described, model_args=kwargs, safe_serialization=True)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["model_args"].pop("num_classes", None)  # transformers also passes the top-level num_classes
    atomic_write(path / "config.json", json.dumps(config, indent=2))
    atomic_write(path / "README.md", model_card(info, cfg.get("paper_ids", ""), path))
    return "config.json, model.safetensors, README.md"


def model_card(info: LoadedModel, paper: str, folder: Path) -> str:
    """Return the content of README.md: the model, its data, and `paper` ("arXiv:2304.06446" or "")."""
    settings = info.checkpoint.get("args") or {}
    details = {"Model": f"{info.arch}, {count_parameters(info.model):,} parameters, {info.num_classes} classes"}
    if "data_set" in settings:
        details["Data"] = data_name(settings["data_set"], settings.get("data_path"))
    if paper:
        details["Paper"] = f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}"
    usage = USAGE.format(folder=folder)
    return generate_readme({"license": "unknown", "details": details, "usage": usage}, folder.name)


# ------------------------------------------------------------------------------------------------------------- graphs


def write_onnx(args: argparse.Namespace, path: Path) -> str:
    """Write an ONNX file, after checking its logits in onnxruntime."""
    import onnx  # optional

    kwargs = {"dynamic_img_size": True} if args.dynamic_size else {}
    info = load_checkpoint(args.checkpoint, args.arch, ema=args.ema, model_kwargs=kwargs)
    size, sizes, axes = info.input_size, [info.input_size], ANY_BATCH
    if args.dynamic_size:
        if not isinstance(info.model, ImageModel):
            raise UserError(f"--dynamic-size: {info.arch} is not a model of this project")
        stride = info.model.feature_info[-1]["reduction"]
        rows, columns = (Dim(name, min=2, max=LARGEST_SIDE // stride) for name in ("rows", "columns"))
        axes = ANY_BATCH | {2: stride * rows, 3: stride * columns}
        native = tuple(max(side // stride, 2) * stride for side in info.input_size)
        sizes = [(2 * stride, 3 * stride), (5 * stride, 4 * stride), native]
        size = (native[0] + stride, native[1] + 2 * stride)  # trace at another size, so that weights are resampled
    channels = image_shape(info)[0]
    proto = to_onnx(info.model, (channels, *size), axes)
    onnx.helper.set_model_props(proto, metadata(info))
    difference = check(in_onnxruntime(proto), info.model, [(channels, *size) for size in sizes])
    content = proto.SerializeToString()
    atomic_write(path, content)
    return (
        f"opset {OPSET}, {len(content) / 1e6:.1f} MB, any batch size{' and image size' * args.dynamic_size}; "
        f"its logits in onnxruntime differ by at most {difference:.1e}"
    )


def write_pt2(args: argparse.Namespace, path: Path) -> str:
    """Write a torch.export program, after checking its logits."""
    info = load_checkpoint(args.checkpoint, args.arch, ema=args.ema)
    program = export(info.model, image_shape(info), ANY_BATCH)
    difference = check(program.module(), info.model, [image_shape(info)])
    extra = {"model.json": json.dumps(metadata(info))}
    atomic_write(path, lambda file: torch.export.save(program, file, extra_files=extra))
    return f"torch {torch.__version__}; its logits differ by at most {difference:.1e}"


FORMATS = {
    "safetensors": write_weights,
    "original": write_weights,
    "hub": write_hub,
    "onnx": write_onnx,
    "pt2": write_pt2,
}


def in_onnxruntime(proto: Any) -> Callable[[Tensor], Tensor]:
    """Return a function from images to logits that runs an onnx.ModelProto on the CPU, with torch's threads."""
    import onnxruntime  # optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def image_shape(info: LoadedModel) -> Shape:
    return info.model_kwargs.get("in_chans", 3), *info.input_size


def export(model: nn.Module, shape: Shape, axes: dict[int, Any]) -> ExportedProgram:
    """Trace the model with images of `shape`; `axes` maps the dynamic axes of the batch to their dimensions."""
    images = torch.zeros(2, *shape)
    return torch.export.export(
        model, (images,), dynamic_shapes=(axes,), prefer_deferred_runtime_asserts_over_guards=True
    )


def to_onnx(model: nn.Module, shape: Shape, axes: dict[int, Any]) -> Any:
    """Convert a model to an onnx.ModelProto with the input `images` and the output `logits`; see `export`."""
    from onnxscript import opset18 as operators  # optional

    # The exporter's own translation treats a dynamic size as a constant.
    def remainder(x, divisor):
        return operators.Mod(x, operators.CastLike(divisor, x))

    # onnxruntime fuses GELU to one operator only in this order of factors.
    def gelu(x, approximate="none"):
        half, one, root = (operators.CastLike(number, x) for number in (0.5, 1.0, math.sqrt(2)))
        return operators.Mul(operators.Mul(x, operators.Add(operators.Erf(operators.Div(x, root)), one)), half)

    proto = torch.onnx.export(
        export(with_convolutions(model), shape, axes),
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        external_data=False,
        verbose=False,
        custom_translation_table={torch.ops.aten.remainder.Scalar: remainder, torch.ops.aten.gelu.default: gelu},
    ).model_proto
    # PyTorch expands a matrix to a batch of copies before multiplying; ONNX can broadcast the matrix itself.
    matrices = {matrix.name for matrix in proto.graph.initializer if len(matrix.dims) == 2 and min(matrix.dims) > 1}
    copies = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Expand"}
    for node in proto.graph.node:
        if node.op_type == "MatMul" and copies.get(node.input[0]) in matrices:
            node.input[0] = copies[node.input[0]]
    return proto


@torch.no_grad()
def check(run: Callable[[Tensor], Tensor], model: nn.Module, shapes: list[Shape]) -> float:
    """Return the largest difference between the logits of a graph and the model; MachineError if it is too large."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch, *shape, generator=generator) for shape in shapes for batch in BATCHES]
    difference = max((run(images) - model(images)).abs().max().item() for images in batches)
    if not difference <= TOLERANCE:
        raise MachineError(f"the graph's logits differ from the model's by {difference:.1e}; nothing was written")
    return difference


def metadata(info: LoadedModel) -> dict[str, str]:
    """Return the metadata for prediction, as JSON by name."""
    return {key: json.dumps(getattr(info, key)) for key in METADATA_KEYS}


def with_convolutions(model: nn.Module) -> nn.Module:
    """Return a copy of the model that ONNX runtimes run faster; its logits differ only by rounding.

    Replaces the linear layers of feed-forward networks with a depthwise convolution, (B, H, W, C) to (B, H, W, C), by
    1 x 1 convolutions. A runtime that stores images as (B, C, H, W) then transposes the grid, not the wider hidden one.
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
