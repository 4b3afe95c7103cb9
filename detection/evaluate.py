"""Evaluate a detector's checkpoint on data in COCO's layout."""

import argparse
import json
import time

from detection.coco import NUCLEI, open_split
from detection.coco_metrics import evaluate_results, numbers, results_of
from detection.data import build_eval_loader
from detection.detectors import kinds_of
from detection.loading import LoadedDetector
from detection.report import write_report
from detection.task import predict
from inference.evaluate import results_file, setting
from inference.output_files import write_json
from runtime.processes import Distributed
from training.precision import choose_precision
from utils import UserError, atomic_write, say


def evaluate_detector(args: argparse.Namespace, dist: Distributed, loaded: LoadedDetector) -> None:
    """Evaluate on all processes. The main process prints and writes the results, COCO's result files and the report."""
    data_set = "COCO" if args.data_path else "NUCLEI"
    if args.data_set not in (None, data_set):
        raise UserError(f"--data-set {args.data_set}: detectors take COCO with --data-path, and NUCLEI without it")
    args = argparse.Namespace(**vars(args) | {"data_set": data_set})
    kinds = kinds_of(loaded.detector)
    dataset = open_split(args.data_path or NUCLEI, args.split, masks="mask" in kinds)
    if (dataset.category_ids, dataset.class_names) != (loaded.category_ids, loaded.class_names):
        theirs, ours = (", ".join(names[:5]) for names in (dataset.class_names, loaded.class_names))
        raise UserError(f"{dataset.file}: its categories ({theirs}) or their ids differ from {loaded.path}'s ({ours})")
    output = results_file(args, loaded.path)
    model, precision = loaded.model.to(dist.device), choose_precision(args, dist.device)
    began = time.perf_counter()
    results = predict(model, build_eval_loader(dataset, args, dist), dist, precision)
    seconds = time.perf_counter() - began
    if not dist.is_main:
        return
    truth = dataset.ground_truth()
    evaluated = {kind: evaluate_results(truth, results, kind, model.detections) for kind in kinds}
    metrics = {kind: numbers(found) for kind, found in evaluated.items()}
    say(f"{loaded.detector} over {loaded.arch}{' (EMA)' if loaded.ema else ''} on {data_set}, {len(dataset)} images:")
    for kind, values in metrics.items():
        say(f"    {kind}: " + ", ".join(f"{name} {value:.1f}" for name, value in values.items()))
    say(f"    {len(dataset) / seconds:.1f} images/s")
    if output is not None:
        counts = {"images": len(dataset), "detections": model.detections, "seconds": seconds}
        write_json(output, setting(args, dist, loaded) | {"detector": loaded.detector} | counts | metrics)
        say(f"results: {output}")
        for kind in kinds:
            path = output.with_name(f"{output.stem}_{kind}_results.json")
            atomic_write(path, json.dumps(results_of(results, kind)))
            say(f"{kind} results in COCO's format: {path}")
    if args.report is not None:
        write_report(args.report, evaluated, results, dataset, args.min_score)
        say(f"report: {args.report}")
