"""Evaluating a detector's checkpoint, and drawing what it finds in images: infer.py's part of detection."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from detection.coco import open_split
from detection.data import build_eval_loader, data_path
from detection.detectors import Detector
from detection.drawing import Drawn, draw_picture
from detection.evaluation import evaluate_results, results_of, to_results
from detection.from_checkpoint import DetectorInfo, build_detector_from
from detection.report import write_report
from detection.task import as_inputs, predict
from inference.explanations import overlay_paths
from inference.figures import save_figure
from inference.prediction import image_files
from inference.results import check_output, prepare_folder, write_results
from inputs.images import read_image
from runtime.processes import Distributed
from training.precision import choose_precision
from utils import UserError, atomic_write, say

OF_CLASSIFIERS = ("arch", "model_kwargs", "input_size", "classes", "val_split", "eval_crop_pct", "explain", "tta")


def run_detector(args: argparse.Namespace, dist: Distributed, state: dict[str, Any]) -> None:
    """What infer.py does with a detector's checkpoint, whose content is `state`.

    Raises:
        UserError: a flag is of classifiers; or see `build_detector_from`.
    """
    for name in OF_CLASSIFIERS:
        if getattr(args, name) not in (None, False, {}):
            raise UserError(f"--{name.replace('_', '-')} is for classifiers; {args.model_path} holds a detector")
    model, info = build_detector_from(args.model_path, state, args.ema)
    model = model.to(dist.device)
    if args.image is not None:
        draw_images(args, dist, model, info)
    else:
        evaluate_detector(args, dist, model, info)


def evaluate_detector(args: argparse.Namespace, dist: Distributed, model: Detector, info: DetectorInfo) -> None:
    """Evaluate on all processes; the main one prints, and writes results, COCO's result files and the report."""
    data_set = args.data_set or ("COCO" if args.data_path else info.data_set)
    if data_set not in ("COCO", "NUCLEI"):
        raise UserError(f"--data-set {data_set}: a detector is evaluated on COCO (any data in its layout) or NUCLEI")
    args = argparse.Namespace(**vars(args) | {"data_set": data_set})
    kinds = ("box", "mask") if info.detector == "mask_rcnn" else ("box",)
    dataset = open_split(data_path(args), "val", masks="mask" in kinds)
    if (dataset.category_ids, dataset.class_names) != (info.category_ids, info.class_names):
        raise UserError(f"--data-set {data_set}: its categories are not those of {info.path}")
    output = args.output or info.path.with_name(f"{info.path.stem}_{data_set.lower()}.json")
    check_output(output)
    if args.report is not None and dist.is_main:
        prepare_folder(args.report)
    began = time.perf_counter()
    results = predict(model, build_eval_loader(dataset, args, dist), dataset, dist, choose_precision(args, dist.device))
    seconds = time.perf_counter() - began
    if not dist.is_main:
        return
    truth = dataset.ground_truth()
    evaluated = {kind: evaluate_results(truth, results, kind, model.detections) for kind in kinds}
    numbers = {kind: found.numbers() for kind, found in evaluated.items()}
    say(f"{info.detector} over {info.arch}{' (EMA)' if info.ema else ''} on {data_set}, {len(dataset)} images:")
    for kind, values in numbers.items():
        say(f"    {kind}: " + ", ".join(f"{name} {value:.1f}" for name, value in values.items()))
    say(f"    {len(dataset) / seconds:.1f} images/s")
    setting = {
        "model_path": str(info.path),
        "arch": info.arch,
        "detector": info.detector,
        "ema": info.ema,
        "data_set": data_set,
        "data_path": args.data_path,
        "images": len(dataset),
        "detections": model.detections,
        "processes": dist.world_size,
        "device": str(dist.device),
        "amp": args.amp,
        "seconds": seconds,
    }
    write_results(output, numbers | setting)
    say(f"results: {output}")
    for kind in kinds:
        path = output.with_name(f"{output.stem}_{kind}_results.json")
        atomic_write(path, json.dumps(results_of(results, kind)))
        say(f"{kind} results in COCO's format: {path}")
    if args.report is not None:
        write_report(args.report, evaluated, results, dataset, args.min_score)
        say(f"report: {args.report}")


@torch.no_grad()
def draw_images(args: argparse.Namespace, dist: Distributed, model: Detector, info: DetectorInfo) -> None:
    """Draw what is found in each image; on request write it as JSON."""
    files = image_files(args.image)
    drawings = overlay_paths(files, Path(args.drawings or info.path.parent / "detections"), "--drawings", "detections")
    if args.output is not None:
        check_output(args.output)
    precision = choose_precision(args, dist.device)
    records = []
    for file, drawing in zip(files, drawings, strict=True):
        image = read_image(str(file), upright=True)
        pixels = v2.functional.pil_to_tensor(image).to(dist.device)
        with precision.autocast():
            prediction = model(as_inputs([pixels], precision))[0]
        kept = prediction["scores"] >= args.min_score
        prediction = {name: value[kept].float().cpu() for name, value in prediction.items()}
        names = [info.class_names[label - 1] for label in prediction["labels"].long().tolist()]
        masks = (prediction["masks"][:, 0] > 0.5).numpy() if "masks" in prediction else None
        drawn = Drawn(prediction["boxes"].numpy(), names, prediction["scores"].tolist(), masks)
        save_figure(drawing, draw_picture(image, drawn))
        counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names))) or "nothing"
        say(f"{file}: {counts} with a score of {args.min_score:g} or more; {drawing}")
        prediction["labels"] = prediction["labels"].long()
        found = to_results(prediction, 0, info.category_ids)
        records.append({"image": str(file), "objects": [_record(r, n) for r, n in zip(found, names, strict=True)]})
    if args.output is not None:
        write_results(args.output, {"model_path": str(info.path), "arch": info.arch, "predictions": records})


def _record(result: dict[str, Any], name: str) -> dict[str, Any]:
    """An object found, without the id of an image that has none."""
    return {"category": name} | {key: value for key, value in result.items() if key != "image_id"}
