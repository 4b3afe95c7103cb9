"""Models as `python -m tools.export --to onnx` writes them, in onnxruntime."""

from collections.abc import Callable

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim

from tools.export.graphs import export, to_onnx
from tools.export.portable import portable


def in_onnxruntime(model: nn.Module, img_size: int) -> Callable[[Tensor], Tensor]:
    """Logits by onnxruntime, on as many threads as torch has."""
    program = export(portable(model.eval(), dynamic=False), (img_size, img_size), {0: Dim("batch")})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = to_onnx(program).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
