"""The authors' checkpoints into our names and back, and strict loading that names what does not fit."""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]

# Authors' name -> ours: the pyramid's parts outside the stages, parts of a stage, scattering weights.
_PREFIXES = {"patch_embed1.": "stem.", "norm4.": "norm.", "post_network.0.": "class_block."}
_PARTS = {"patch_embed": "downsample", "norm": "norm", "block": "blocks"}
_PARTS_ORIGINAL = {ours: theirs for theirs, ours in _PARTS.items()}
_SCATTERING = {
    "complex_weight_ll": "low_pass",
    "complex_weight_lh_1": "channel_blend.weight1",
    "complex_weight_lh_2": "channel_blend.weight2",
    "complex_weight_lh_b1": "channel_blend.bias1",
    "complex_weight_lh_b2": "channel_blend.bias2",
    "complex_weight_lh_1_t": "token_blend.weight1",
    "complex_weight_lh_2_t": "token_blend.weight2",
    "complex_weight_lh_b1_t": "token_blend.bias1",
    "complex_weight_lh_b2_t": "token_blend.bias2",
}
_SCATTERING_ORIGINAL = {ours: theirs for theirs, ours in _SCATTERING.items()}
_WAVELET_FILTER = re.compile(r"(^|\.)(xfm|ifm)\.")
_WRAPPERS = ("module.", "_orig_mod.")
_HEADS = ("head", "aux_head")


class WeightMismatch(ValueError):
    """A checkpoint does not fit the model; the message names the keys in one line."""


def to_ours(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Rename the authors' entries to ours; entries that have our names already stay.

    Query and key-value layers of the pyramid become one, low-pass weights channels-last. No number changes.
    """
    ours: StateDict = {}
    for name, value in state_dict.items():
        new = _our_name(name)
        if new.endswith(".low_pass") and not name.endswith(".low_pass"):
            value = value.permute(1, 2, 0).contiguous()
        ours[new] = value
    return _join_qkv(ours)


def _our_name(name: str) -> str:
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if match := re.fullmatch(r"(patch_embed|norm|block)([1-4])\.(.+)", name):
        kind, stage, rest = match.groups()
        name = f"stages.{int(stage) - 1}.{_PARTS[kind]}.{rest}"
    if match := re.fullmatch(r"(.*blocks\.\d+\.)(?:attn|filter)\.(.+)", name):
        block, leaf = match.groups()
        name = f"{block}mixer.{_SCATTERING.get(leaf, leaf)}"
    return name.replace(".dwconv.dwconv.", ".dwconv.")


def _join_qkv(state_dict: StateDict) -> StateDict:
    """Join q and kv of the blocks' attention; the class block keeps them apart."""
    joined: StateDict = {}
    for name, value in state_dict.items():
        match = re.fullmatch(r"(.*\.mixer\.)(q|kv)\.(weight|bias)", name)
        if match is None:
            joined[name] = value
            continue
        prefix, part, leaf = match.groups()
        if part == "kv" and f"{prefix}q.{leaf}" in state_dict:
            continue
        if f"{prefix}kv.{leaf}" not in state_dict:
            joined[name] = value  # half a pair: reported by its name
            continue
        joined[f"{prefix}qkv.{leaf}"] = torch.cat((value, state_dict[f"{prefix}kv.{leaf}"]))
    return joined


def to_original(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Rename our entries to the authors': the inverse of `to_ours`, bit for bit.

    The family is read off the names: a pyramid has a stem. Gradients, shaped like the weights, convert too.
    """
    pyramid = any(name.startswith("stem.") for name in state_dict)
    original: StateDict = {}
    for name, value in state_dict.items():
        if name.endswith(".low_pass"):
            value = value.permute(2, 0, 1).contiguous()
        match = re.fullmatch(r"(.*\.mixer\.)qkv\.(weight|bias)", name)
        if pyramid and match:
            prefix, leaf = match.groups()
            dim = value.shape[0] // 3
            original[_original_name(f"{prefix}q.{leaf}", pyramid)] = value[:dim].clone()
            original[_original_name(f"{prefix}kv.{leaf}", pyramid)] = value[dim:].clone()
        else:
            original[_original_name(name, pyramid)] = value
    return original


def _original_name(name: str, pyramid: bool) -> str:
    if match := re.fullmatch(r"(.*)\.mixer\.(.+)", name):
        block, leaf = match.groups()
        gate = "attn" if pyramid or leaf != "complex_weight" else "filter"
        name = f"{block}.{gate}.{_SCATTERING_ORIGINAL.get(leaf, leaf)}"
    if not pyramid:
        return name
    for theirs, ours in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"stages\.(\d)\.(downsample|norm|blocks)\.(.+)", name):
        stage, part, rest = match.groups()
        name = f"{_PARTS_ORIGINAL[part]}{int(stage) + 1}.{rest}"
    return name.replace(".dwconv.", ".dwconv.dwconv.")


def unwrap(checkpoint: Mapping) -> StateDict:
    """The state dict inside {"model": ...}, {"state_dict": ...} or both, without `module.` prefixes."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    return {_strip(name): value for name, value in checkpoint.items()}


def _strip(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> StateDict:
    """A checkpoint of the authors or of ours, in any of the known layouts, as a state dict for `model`.

    Renames, drops the wavelet filters some files hold and an `aux_head` the model has not, and resamples what
    depends on the grid to the model's. What remains wrong is left for the loading to report.
    """
    weights = unwrap(state_dict)
    if not hasattr(model, "checkpoint_format"):
        return weights
    weights = {name: value for name, value in to_ours(weights).items() if not _WAVELET_FILTER.search(name)}
    if getattr(model, "aux_head", None) is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("aux_head.")}
    return _resize(weights, model)


def _resize(weights: StateDict, model: nn.Module) -> StateDict:
    weights = dict(weights)
    if "pos_embed" in weights and hasattr(model, "pos_embed"):
        source = _source_grid(weights, model.pos_embed.shape[1], model.grid_size)
        if source is not None:
            weights |= model.resize_weights(weights, source)
    for prefix, module in model.named_modules():
        if not (prefix.endswith(".mixer") and hasattr(module, "resize_weights")):
            continue
        start = f"{prefix}."
        own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        resized = module.resize_weights(own, module.grid_size)
        weights |= {start + name: value for name, value in resized.items()}
    return weights


def _source_grid(weights: StateDict, tokens: int, model_grid: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of a file's position embeddings: told by its filters, else the model's, else a square."""
    count = weights["pos_embed"].shape[1] if weights["pos_embed"].ndim == 3 else 0
    gate = next((w for name, w in weights.items() if name.endswith("mixer.complex_weight")), None)
    if gate is not None and gate.ndim == 4 and count and count % gate.shape[0] == 0:
        return gate.shape[0], count // gate.shape[0]
    if count == tokens:
        return model_grid
    side = math.isqrt(count)
    return (side, side) if count and side * side == count else None


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's classifiers."""
    if hasattr(model, "checkpoint_format"):
        return _HEADS
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def load_weights(model: nn.Module, state_dict: Mapping, new_head: bool = False) -> list[str]:
    """Load a checkpoint into a model of this project or any other timm model; returns what it left untouched.

    Converts names, unwraps layouts and resamples as `checkpoint_filter_fn`. With `new_head` the file's
    classifiers are ignored and exactly those of the model may be missing. Anything else missing, unexpected
    or of another shape raises WeightMismatch and leaves the model as it was.
    """
    weights = checkpoint_filter_fn(state_dict, model)
    heads = tuple(f"{name}." for name in classifier_names(model))
    if new_head:
        weights = {name: value for name, value in weights.items() if not name.startswith(heads)}
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    untouched = [name for name in missing if new_head and name.startswith(heads)]
    problems = [
        _listed("missing", [name for name in missing if name not in untouched]),
        _listed("unexpected", [name for name in weights if name not in expected]),
        _listed("of another shape", _misshapen(weights, expected)),
    ]
    if any(problems):
        raise WeightMismatch("the weights do not fit the model: " + "; ".join(filter(None, problems)))
    model.load_state_dict(weights, strict=False)
    return untouched


def _misshapen(weights: Mapping, expected: Mapping[str, Tensor]) -> Iterable[str]:
    for name, value in weights.items():
        if name not in expected:
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != tuple(expected[name].shape):
            yield f"{name} ({shape}, not {tuple(expected[name].shape)})"


def _listed(what: str, names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{what}: {', '.join(names[:limit])}{more}"
