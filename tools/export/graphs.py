"""A model as a graph that needs none of this code: ONNX, and PyTorch's exported programs."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from models import LoadedModel, load_checkpoint
from models.base import ImageModel
from models.checkpoints import METADATA_KEYS
from models.layers import Grid
from tools.export.portable import portable
from utils import MachineError, UserError, atomic_write, one_line

if TYPE_CHECKING:
    import onnx

OPSET = 18  # what TensorRT, CoreML's converters and onnxruntime have had for long
TOLERANCE = 1e-4  # of a logit
LARGEST_SIDE = 4096  # pixels, of images of any size
BATCHES = (1, 3)  # that a graph is checked with; it is made with another


def write_onnx(args: argparse.Namespace) -> str:
    """An ONNX file, once onnxruntime has given torch's logits with it; says how close they are."""
    _check_suffix(args.path, ".onnx")
    runtime, onnx = (_package(name) for name in ("onnxruntime", "onnx"))
    kwargs = {"dynamic_img_size": True} if args.dynamic_size else {}
    info = load_checkpoint(args.checkpoint, ema=args.ema, model_kwargs=kwargs)
    model = info.model
    if args.dynamic_size and not isinstance(model, ImageModel):
        raise UserError(f"--dynamic-size: {info.arch} is not one of this project's models")
    size, sizes = info.input_size, [info.input_size]
    shape = {0: Dim("batch")}
    if args.dynamic_size:
        stride = model.feature_info[-1]["reduction"]
        rows, columns = (Dim(name, min=2, max=LARGEST_SIDE // stride) for name in ("rows", "columns"))
        shape |= {2: stride * rows, 3: stride * columns}
        sizes = [(stride * height, stride * width) for height, width in ((2, 3), (5, 4))]
        native = tuple(max(side // stride, 2) * stride for side in info.input_size)
        # Made at a size where weights are resampled, so that this is a part of the graph.
        size, sizes = (native[0] + stride, native[1] + 2 * stride), [*sizes, native]
    proto = to_onnx(export(portable(model, args.dynamic_size), size, shape))
    onnx.helper.set_model_props(proto, _metadata(info))
    content = proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = _check(lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), model, sizes)
    atomic_write(args.path, content)
    return (
        f"opset {OPSET}, {len(content) / 1e6:.1f} MB, {_described(sizes, args.dynamic_size)}; "
        f"onnxruntime's logits within {difference:.1e} of torch's"
    )


def to_onnx(program: ExportedProgram) -> onnx.ModelProto:
    """The program's graph, from `images` to `logits`."""
    operators = _package("onnxscript").opset18

    # The exporter's own takes a size that is dynamic for a number.
    def remainder(x, divisor):
        return operators.Mod(x, operators.CastLike(divisor, x))

    # The exporter's own is in an order in which onnxruntime does not see GELU, for which it has one operation.
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
    _multiply_by_one_matrix(proto.graph)
    return proto


def _multiply_by_one_matrix(graph: onnx.GraphProto) -> None:
    """Where a batch is multiplied by as many copies of one matrix, which PyTorch needs and ONNX does not, name it."""
    matrices = {matrix.name for matrix in graph.initializer if len(matrix.dims) == 2 and min(matrix.dims) > 1}
    copies = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Expand"}
    for node in graph.node:
        if node.op_type == "MatMul" and copies.get(node.input[0]) in matrices:
            node.input[0] = copies[node.input[0]]


def write_pt2(args: argparse.Namespace) -> str:
    """A program of torch.export's or, compiled, of AOTInductor's, once it has given the model's logits."""
    _check_suffix(args.path, ".pt2")
    info = load_checkpoint(args.checkpoint, ema=args.ema)
    model = info.model
    program = export(model, info.input_size, {0: Dim("batch")})
    if args.compile:
        content, run = _compiled(program, info)
    else:
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"model.json": json.dumps(_metadata(info))})
        content = buffer.getvalue()
        run = torch.export.load(io.BytesIO(content)).module()
    sizes = [info.input_size]
    difference = _check(run, model, sizes)
    atomic_write(args.path, content)
    return (
        f"by torch {torch.__version__}, {len(content) / 1e6:.1f} MB, {_described(sizes, False)}; "
        f"its logits within {difference:.1e} of the model's"
    )


def _compiled(program: ExportedProgram, info: LoadedModel) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """AOTInductor's package, and what to call."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.exc import InvalidCxxCompiler

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = aoti_compile_and_package(
                program,
                package_path=f"{folder}/model.pt2",
                inductor_configs={"aot_inductor.metadata": _metadata(info)},
            )
        except InvalidCxxCompiler as error:
            raise UserError("--compile needs a C++ compiler: install g++ or name another by CXX") from error
        return Path(path).read_bytes(), aoti_load_package(path)


def export(model: nn.Module, size: Grid, shape: dict[int, Any]) -> ExportedProgram:
    """The model's graph for images of (height, width); `shape` says which of their axes are dynamic."""
    images = torch.zeros(2, 3, *size)
    return torch.export.export(
        model, (images,), dynamic_shapes=(shape,), prefer_deferred_runtime_asserts_over_guards=True
    )


@torch.no_grad()
def _check(run: Callable[[Tensor], Tensor], model: nn.Module, sizes: list[Grid]) -> float:
    """The largest difference of a graph's logits and the model's; raises MachineError where it is too large."""
    generator = torch.Generator().manual_seed(0)
    difference = 0.0
    for size in sizes:
        for batch in BATCHES:
            images = torch.randn(batch, 3, *size, generator=generator)
            difference = max(difference, (run(images) - model(images)).abs().max().item())
    if not difference <= TOLERANCE:
        raise MachineError(f"the graph's logits differ from the model's by {difference:.1e}; nothing was written")
    return difference


def _metadata(info: LoadedModel) -> dict[str, str]:
    """What prediction has to know, as JSON by name."""
    found = {key: getattr(info, key) for key in METADATA_KEYS}
    return {key: json.dumps(value) for key, value in found.items() if value is not None}


def _described(sizes: list[Grid], dynamic: bool) -> str:
    checked = ", ".join(f"{height}x{width}" for height, width in sizes)
    return f"any number of images of any size, checked at {checked}" if dynamic else f"any number of images, {checked}"


def _check_suffix(path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise UserError(f"{path}: name it {suffix}")


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--to onnx needs pip install onnx onnxruntime onnxscript: {one_line(error)}") from error
