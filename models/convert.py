"""Convert the weight names of the authors' checkpoints to ours and back."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .checkpoints import StateDict

# Authors' name -> ours: the beginnings of a pyramid's names, and the weights of a scattering mixer.
_STAGE = {"patch_embed": "downsample", "norm": "norm", "block": "blocks"}
_PREFIXES = {f"{theirs}{i + 1}.": f"stages.{i}.{ours}." for theirs, ours in _STAGE.items() for i in range(4)}
_PREFIXES |= {"patch_embed1.": "stem.", "norm4.": "norm.", "post_network.0.": "class_block."}
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
_PREFIXES_ORIGINAL, _SCATTERING_ORIGINAL = (
    {ours: theirs for theirs, ours in names.items()} for names in (_PREFIXES, _SCATTERING)
)


def to_ours(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Convert the authors' weight names to ours; our own names stay unchanged.

    Also joins a pyramid's query and key-value layers, and makes low-pass weights channels-last. No value changes.
    """
    ours: StateDict = {}
    for name, value in state_dict.items():
        new = _our_name(name)
        if new.endswith(".low_pass") and not name.endswith(".low_pass"):
            value = value.permute(1, 2, 0).contiguous()
        ours[new] = value
    return _join_qkv(ours)


def _our_name(name: str) -> str:
    name = _replace_prefix(name, _PREFIXES)
    if match := re.fullmatch(r"(.*blocks\.\d+\.)(?:attn|filter)\.(.+)", name):
        block, leaf = match.groups()
        name = f"{block}mixer.{_SCATTERING.get(leaf, leaf)}"
    return name.replace(".dwconv.dwconv.", ".dwconv.")


def _join_qkv(state_dict: StateDict) -> StateDict:
    """Join q and kv of the blocks' attention, but not of the class block. An incomplete pair stays unchanged."""
    joined = dict(state_dict)
    for name in state_dict:
        kv = name.replace(".mixer.q.", ".mixer.kv.")
        if kv != name and kv in state_dict:
            joined[name.replace(".mixer.q.", ".mixer.qkv.")] = torch.cat((joined.pop(name), joined.pop(kv)))
    return joined


def to_original(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Convert our weight names to the authors': the exact inverse of `to_ours`, also for gradients.

    The presence of a stem in the names shows that the model is a pyramid.
    """
    pyramid = any(name.startswith("stem.") for name in state_dict)
    original: StateDict = {}
    for name, value in state_dict.items():
        if name.endswith(".low_pass"):
            value = value.permute(2, 0, 1).contiguous()
        theirs = _original_name(name, pyramid)
        if pyramid and ".qkv." in name:
            width = len(value) // 3
            original[theirs.replace(".qkv.", ".q.")] = value[:width].clone()
            original[theirs.replace(".qkv.", ".kv.")] = value[width:].clone()
        else:
            original[theirs] = value
    return original


def _original_name(name: str, pyramid: bool) -> str:
    if match := re.fullmatch(r"(.*)\.mixer\.(.+)", name):
        block, leaf = match.groups()
        gate = "attn" if pyramid or leaf != "complex_weight" else "filter"
        name = f"{block}.{gate}.{_SCATTERING_ORIGINAL.get(leaf, leaf)}"
    return _replace_prefix(name, _PREFIXES_ORIGINAL).replace(".dwconv.", ".dwconv.dwconv.") if pyramid else name


def _replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes[old] + name.removeprefix(old) if old else name
