"""Hugging Face's layout of a model, as timm writes and reads it, with a card that says what the checkpoint knows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import upload_file
from timm.models import push_to_hf_hub, save_for_hf
from timm.models._hub import generate_readme
from torch import nn

from models import LoadedModel, load_checkpoint
from training.model import count_parameters
from utils import UserError, cannot_write, make_directory, one_line

PACKAGE = "spectformer_svt"
CITATIONS = {
    "arXiv:2304.06446": """@article{patro2023spectformer,
  title={SpectFormer: Frequency and Attention is what you need in a Vision Transformer},
  author={Patro, Badri N. and Namboodiri, Vinay P. and Agneeswaran, Vijay Srinivas},
  journal={arXiv preprint arXiv:2304.06446},
  year={2023}
}""",
    "arXiv:2311.01310": """@inproceedings{patro2023scattering,
  title={Scattering Vision Transformer: Spectral Mixing Matters},
  author={Patro, Badri N. and Agneeswaran, Vijay Srinivas},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023}
}""",
}
# The flags of a run that a reader wants to know; a file holds them under `args`.
RECIPE = (
    "epochs", "batch_size", "accum_iter", "opt", "lr", "sched", "warmup_epochs", "weight_decay", "clip_grad", "drop",
    "drop_path", "model_ema", "mixup", "cutmix", "smoothing", "aa", "color_jitter", "reprob", "repeated_aug",
    "token_label", "distillation_type", "seed",
)  # fmt: skip


def write_hub(args: argparse.Namespace) -> str:
    """config.json, model.safetensors and README.md in a folder, and the same on the Hub if --push asks for it."""
    info = load_checkpoint(args.checkpoint, ema=args.ema)
    state, model = info.checkpoint, info.model
    card = model_card(state, model, info, args.push or f"local-dir:{args.path}")
    made = {
        "model_config": {"label_names": list(info.class_names), "pretrained_cfg": preprocessing(info)},
        "model_args": construction(model, info),
        "safe_serialization": True,
    }
    make_directory(args.path)
    try:
        save_for_hf(model, args.path, **made)
        name_classes_once(args.path / "config.json")
        (args.path / "README.md").write_text(generate_readme(card, card_name(args)), encoding="utf-8")
    except OSError as error:
        raise cannot_write(args.path, error) from error
    files = "config.json, model.safetensors, README.md"
    if args.push is None:
        return files
    try:
        push_to_hf_hub(model, args.push, model_card=card, **made)
        config = args.path / "config.json"  # without what timm put in
        url = upload_file(path_or_fileobj=config, path_in_repo=config.name, repo_id=args.push).repo_url
    except (OSError, ValueError) as error:  # what the Hub's library raises derives from these
        raise UserError(f"--push {args.push}: {one_line(error)}") from error
    return f"{files}; uploaded: {url}"


def name_classes_once(config: Path) -> None:
    """Take `num_classes` from the arguments in config.json, where timm 1.0.31 puts it beside the entry of that name.

    transformers (5.23) would pass both to `timm.create_model`.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    content["model_args"].pop("num_classes", None)
    config.write_text(json.dumps(content, indent=2), encoding="utf-8")


def card_name(args: argparse.Namespace) -> str:
    return Path(args.push or args.path.resolve()).name


def preprocessing(info: LoadedModel) -> dict[str, Any]:
    """What timm's `pretrained_cfg` says of images."""
    names = ("mean", "std", "crop_pct", "interpolation")
    return {name: getattr(info, name) for name in names} | {"input_size": (3, *info.input_size)}


def construction(model: nn.Module, info: LoadedModel) -> dict[str, Any]:
    """The arguments that build the model again, also where nobody reads its `pretrained_cfg`, as in transformers."""
    size = {"img_size": info.input_size} if model.pretrained_cfg.get("fixed_input_size") else {}
    return info.model_kwargs | size


def model_card(state: Mapping[str, Any], model: nn.Module, info: LoadedModel, source: str) -> dict[str, Any]:
    """What timm's functions make a README of; `source` is where the model will be found."""
    cfg = model.pretrained_cfg
    height, width = info.input_size
    details: dict[str, Any] = {
        "Model": f"{info.arch}, {count_parameters(model):,} parameters, {info.num_classes} classes",
        "Images": f"{height} x {width}, mean {list(info.mean)}, std {list(info.std)}, crop {info.crop_pct:g}",
    }
    if info.model_kwargs:
        details["Arguments"] = {name: f"`{value!r}`" for name, value in info.model_kwargs.items()}
    trained = state.get("args") or {}
    if data_set := trained.get("data_set"):
        details["Data"] = data_set + (f", classes {', '.join(trained['classes'])}" if trained.get("classes") else "")
    if (accuracy := told_accuracy(state, info)) is not None:
        details["Accuracy"] = accuracy
    settings = state.get("args") or {}
    recipe = {
        name: f"`{settings[name]!r}`" for name in RECIPE if settings.get(name) not in (None, "", "none", 0, False)
    }
    if recipe:
        details["Recipe"] = recipe | {"processes": f"`{state.get('world_size', 1)}`"}
    if version := state.get("version"):
        details["Trained with"] = ", ".join(f"{name} {number}" for name, number in version.items())
    if paper := cfg.get("paper_name"):
        details["Paper"] = f"{paper}: {cfg.get('paper_ids')}"
    described = f"A {info.arch} for image classification" + (f", trained on {data_set}." if data_set else ".")
    citation = CITATIONS.get(cfg.get("paper_ids"))
    return {
        "license": cfg.get("license") or "unknown",
        "description": described,
        "details": details,
        "usage": usage(info, source),
    } | ({"citation": citation} if citation else {})


def told_accuracy(state: Mapping[str, Any], info: LoadedModel) -> str | None:
    """The last finished epoch's, if it is of the exported weights: a run's score can be its average's."""
    score = state.get("acc1")
    data_set = (state.get("args") or {}).get("data_set")
    if score is None or not state.get("epoch") or state.get("step") or state.get("averaged", False) != info.ema:
        return None
    return f"{score:.2f} % top-1 on the validation images of {data_set}, after epoch {state['epoch']}"


def usage(info: LoadedModel, source: str) -> str:
    """How to load it."""
    place = source if source.startswith("local-dir:") else f"hf-hub:{source}"
    return f"""
```python
import timm, torch
import {PACKAGE}  # registers the models; pip install . in a clone of their repository

model = timm.create_model("{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(torch.zeros(1, 3, {info.input_size[0]}, {info.input_size[1]}))
```
"""
