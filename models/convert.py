"""Convert the weight names of the authors' checkpoints to ours and back."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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
    """Join q and kv of the blocks' attention, but not of the class block. An incomplete pair stays unchanged."""
    joined = dict(state_dict)
    for name in state_dict:
        match = re.fullmatch(r"(.*\.mixer\.)q\.(weight|bias)", name)
        if match and (kv := f"{match[1]}kv.{match[2]}") in state_dict:
            joined[f"{match[1]}qkv.{match[2]}"] = torch.cat((joined.pop(name), joined.pop(kv)))
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
