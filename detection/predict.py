"""Detect objects in images and draw them."""

import argparse
from collections import Counter
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from detection.coco_metrics import to_results
from detection.data import build_eval_loader
from detection.drawing import draw_objects
from detection.loading import LoadedDetector
from detection.task import as_inputs
from inference.explanations import overlay_paths
from inference.output_files import check_output, write_json
from inference.predict import image_files, report_unreadable
from inputs.images import file_dataset
from runtime.processes import Distributed
from training.precision import choose_precision
from utils import atomic_write, say


@torch.no_grad()
def draw_objects_in(args: argparse.Namespace, dist: Distributed, loaded: LoadedDetector) -> None:
    """Draw the detected objects of each image; on request, write them as JSON.

    Raises:
        UserError: at the end, if some of the images could not be read.
    """
    files = image_files(args.image)
    drawings = overlay_paths(files, Path(args.drawings), "--drawings", "detections")
    check_output(args.output)
    model, precision = loaded.model.to(dist.device), choose_precision(args, dist.device)
    names = dict(zip(loaded.category_ids, loaded.class_names, strict=True))
    photographs = file_dataset(files, [0] * len(files), ["unknown"], upright=True)
    loader = build_eval_loader(photographs, args, dist, skip_bad_images=True)
    records = []
    for batch in loader:
        file, drawing = (paths[int(batch.indices)] for paths in (files, drawings))
        with precision.autocast():
            (prediction,) = model(as_inputs(batch.images, precision))
        kept = prediction["scores"] >= args.min_score
        objects = to_results({name: value[kept] for name, value in prediction.items()}, 0, loaded.category_ids)
        picture = draw_objects(to_pil_image(batch.images[0]), objects, names)
        atomic_write(drawing, lambda file, picture=picture: picture.save(file, "png"))
        if not args.quiet:
            counts = Counter(names[entry["category_id"]] for entry in objects)
            listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"
            say(f"{file}: {listed} with a score of {args.min_score:g} or more; {drawing}")
        for entry in objects:
            del entry["image_id"]
        objects = [{"category": names[entry["category_id"]]} | entry for entry in objects]
        records.append({"image": str(file), "objects": objects})
    if args.output is not None:
        write_json(args.output, {"model_path": str(loaded.path), "arch": loaded.arch, "predictions": records})
    report_unreadable(loader)
