"""Detect objects in images and draw them."""

import argparse
from pathlib import Path

import torch
from torchvision.transforms import v2

from detection.coco_metrics import to_results
from detection.drawing import draw_objects
from detection.loading import LoadedDetector
from detection.task import as_inputs
from inference.explanations import overlay_paths
from inference.output_files import check_output, write_json
from inference.predict import image_files, report_unreadable
from inputs.images import BadImage, read_image
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
    if args.output is not None:
        check_output(args.output)
    model, precision = loaded.model.to(dist.device), choose_precision(args, dist.device)
    records, bad = [], []
    for file, drawing in zip(files, drawings, strict=True):
        try:
            image = read_image(file, upright=True)
        except BadImage as error:
            bad.append(error)
            continue
        pixels = v2.functional.pil_to_tensor(image).to(dist.device)
        with precision.autocast():
            prediction = model(as_inputs([pixels], precision))[0]
        kept = prediction["scores"] >= args.min_score
        prediction = {name: value[kept].float().cpu() for name, value in prediction.items()}
        prediction["labels"] = prediction["labels"].long()
        names = [loaded.class_names[label - 1] for label in prediction["labels"].tolist()]
        masks = (prediction["masks"][:, 0] > 0.5).numpy() if "masks" in prediction else None
        picture = draw_objects(image, prediction["boxes"].numpy(), names, prediction["scores"].tolist(), masks)
        atomic_write(drawing, lambda file, picture=picture: picture.save(file, "png"))
        if not args.quiet:
            counts = ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names))) or "nothing"
            say(f"{file}: {counts} with a score of {args.min_score:g} or more; {drawing}")
        objects = [{"category": name} for name in names]
        for record, result in zip(objects, to_results(prediction, 0, loaded.category_ids), strict=True):
            record |= {key: value for key, value in result.items() if key != "image_id"}
        records.append({"image": str(file), "objects": objects})
    if args.output is not None:
        write_json(args.output, {"model_path": str(loaded.path), "arch": loaded.arch, "predictions": records})
    report_unreadable(bad, len(files))
