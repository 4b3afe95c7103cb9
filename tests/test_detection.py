"""Detectors: data, sample order, losses, evaluation, and infer.py with their checkpoints."""

import contextlib
import copy
import io
import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_example import write_example
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models.detection.roi_heads import project_masks_on_boxes

import infer
import main_detection
from detection.backbone import create_classifier, pyramid_features
from detection.coco import NUCLEI, decode_mask, open_split
from detection.coco_metrics import KINDS, evaluate_results, numbers, results_of, to_results
from detection.detectors import STRIDES, build_detector
from detection.report import count_mistakes
from detection.sampler import GroupedSampler
from detection.task import Detection
from detection.transforms import TrainTransform
from inputs.images import BadImage
from models.checkpoints import read_checkpoint
from runtime import checkpoints
from training.optimizer import build_scheduler
from training.options import parse_args
from utils import UserError, seeded

SMALL = {
    "stem_width": 8,
    "embed_dims": (8, 16, 16, 16),
    "depths": (1, 1, 1, 1),
    "spectral_depths": (1, 1, 0, 0),
    "num_heads": (1, 1, 1, 1),
    "mlp_ratios": (2, 2, 2, 2),
}
OPTIONS = {"fpn_channels": 64, "min_size": 64, "max_size": 96, "anchor_sizes": (8, 16, 32, 64, 128)}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("coco") / "cells", scale=4)


def small_detector(kind="mask_rcnn", arch="spectformer_h_s", num_classes=3, **options):
    torch.manual_seed(0)
    kwargs = SMALL if arch.startswith(("spectformer", "svt")) else {}
    body = pyramid_features(create_classifier(arch, (64, 64), kwargs, 0.0), arch, STRIDES[kind])
    return build_detector(kind, body, num_classes, **OPTIONS | options)


def example(seed, height=64, width=80, objects=3):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(objects, 2, generator=generator) * torch.tensor([width - 30, height - 30])
    boxes = torch.cat((corners, corners + 10 + 15 * torch.rand(objects, 2, generator=generator)), 1)
    masks = torch.zeros(objects, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {"boxes": boxes, "labels": torch.arange(objects) % 3 + 1, "masks": masks}
    return torch.rand(3, height, width, generator=generator), target


# ------------------------------------------------------------------------------------------------------- evaluation


def shifted_results(dataset, seed):
    """Turn a data set's objects into imperfect predictions: shifted, cropped, of another category or duplicated."""
    random, truth, results = np.random.RandomState(seed), dataset.ground_truth(), []
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    for entry in truth["annotations"]:
        for _ in range(random.randint(0, 4)):
            mask = np.roll(
                decode_mask(entry["segmentation"], *sizes[entry["image_id"]]), random.randint(-2, 3, 2), (0, 1)
            )
            rows, columns = np.nonzero(mask)
            prediction = {
                "boxes": torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float(),
                "labels": torch.tensor([random.randint(1, 4)]) if random.rand() < 0.2 else torch.tensor([1]),
                "scores": torch.tensor([round(random.rand(), 2)]),
                "masks": torch.from_numpy(mask)[None, None].float(),
            }
            results += to_results(prediction, entry["image_id"], dataset.category_ids)
    return results


def oracle(annotations, results, kind):
    """Evaluate with pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), KINDS[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_twelve_numbers_are_those_of_pycocotools(cells, kind):
    """The data has crowds, gaps in the category ids, and a category and an image without objects."""
    dataset = open_split(cells, "train", masks=True)
    results = shifted_results(dataset, seed=0)
    found = evaluate_results(dataset.ground_truth(), results, kind, 100)
    expected = oracle(cells / "annotations/instances_train2017.json", results_of(results, kind), kind)
    np.testing.assert_allclose(found.eval["precision"], expected.eval["precision"], atol=1e-9)
    stats = [100 * value for value in expected.stats if value >= 0]
    np.testing.assert_allclose(list(numbers(found).values()), stats, atol=1e-6)
    assert len(stats) >= 8 and 0 < numbers(found)["AP"] < 100


def test_no_prediction_gives_zeros_and_more_than_coco_takes_count_where_they_are_asked_for(cells):
    dataset = open_split(cells, "train", masks=True)
    truth, results = dataset.ground_truth(), shifted_results(dataset, seed=1)
    assert set(numbers(evaluate_results(truth, [], "mask", 100)).values()) == {0.0}
    few, many = (numbers(evaluate_results(truth, results, "box", most))["AR"] for most in (11, 200))
    assert many > few


def test_mistakes_are_missed_objects_and_wrong_predictions_outside_crowds():
    objects = [
        {"id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 0},
        {"id": 2, "category_id": 1, "bbox": [50, 50, 10, 10], "iscrowd": 0},
        {"id": 3, "category_id": 1, "bbox": [100, 0, 50, 50], "iscrowd": 1},
    ]
    results = [
        {"category_id": 1, "bbox": [1, 0, 10, 10], "score": 0.9},
        {"category_id": 1, "bbox": [0, 1, 10, 10], "score": 0.8},  # the same object again
        {"category_id": 1, "bbox": [110, 10, 10, 10], "score": 0.7},  # in the crowd
        {"category_id": 2, "bbox": [50, 50, 10, 10], "score": 0.6},  # another category
    ]
    truth = {"images": [{"id": 7}], "categories": [{"id": 1}, {"id": 2}]}
    truth["annotations"] = [entry | {"image_id": 7, "area": math.prod(entry["bbox"][2:])} for entry in objects]
    assert count_mistakes(truth, [result | {"image_id": 7} for result in results]) == ({7: 1}, {7: 2})
    assert count_mistakes(truth, []) == ({7: 2}, {})


# ------------------------------------------------------------------------------------------------ annotation files


def respell(cells, root, change):
    """Copy the example's training split, change its annotations, and return the new root."""
    content = json.loads((cells / "annotations/instances_train2017.json").read_text())
    change(content)
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))
    (root / "train2017").symlink_to(cells / "train2017")
    return root


SPOILED = {
    "no size": (("images", 1, {"height": ..., "width": ...}), r"KeyError\('width'\)"),
    "unknown category": (("annotations", 2, {"category_id": 4}), "annotation 3 refers to a missing image or category"),
    "box of three": (("annotations", 2, {"bbox": [1, 2, 3]}), "not a complete file in COCO's format"),
    "no mask": (("annotations", 2, {"segmentation": []}), r"1 of \d+ objects .*annotation 3.*--detector faster_rcnn"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_wrong_in_an_annotation_file_is_said_in_one_line(cells, tmp_path, case):
    (kind, index, values), message = SPOILED[case]

    def spoil(content):
        entry = content[kind][index] | values
        content[kind][index] = {key: value for key, value in entry.items() if value is not ...}

    root = respell(cells, tmp_path, spoil)
    with pytest.raises(UserError, match=message) as error:
        open_split(root, "train", masks=True)
    assert "\n" not in str(error.value) and "instances_train2017.json" in str(error.value)
    file = root / "annotations/instances_train2017.json"
    file.write_text(file.read_text()[:999])
    with pytest.raises(UserError, match="instances_train2017.json: not a complete file in COCO's format"):
        open_split(root, "train", masks=True)


def test_a_mask_that_cannot_be_decoded_is_named_with_its_image(cells, tmp_path):
    damage = {"size": [9, 9], "counts": [81]}
    root = respell(cells, tmp_path, lambda content: content["annotations"][2].update(segmentation=damage))
    dataset = open_split(root, "train", masks=True)
    with pytest.raises(BadImage, match=r"\.png: a mask in .*instances_train2017.json: its size is 9x9"):
        for index in range(len(dataset)):
            dataset.load(index)


def test_crowds_and_objects_without_area_are_not_trained_on_and_the_latter_need_no_mask(cells, tmp_path):
    def flatten(content):
        entry = next(entry for entry in content["annotations"] if not entry["iscrowd"])
        entry["bbox"][2], entry["segmentation"] = 0.0, []

    spoiled, whole = (open_split(root, "train", masks=True) for root in (respell(cells, tmp_path, flatten), cells))
    assert (spoiled.without_area, whole.without_area, whole.objects - spoiled.objects) == (1, 0, 1)
    for split in (spoiled, whole):
        assert sum(len(split.load(i)[1]["labels"]) for i in range(len(split))) == split.objects
    crowds = sum(entry["iscrowd"] for entry in whole.ground_truth()["annotations"])
    assert crowds > 0 and len(whole.ground_truth()["annotations"]) == whole.objects + crowds
    assert len(whole.load(3)[1]["labels"]) == 0  # an image without objects is kept


@pytest.mark.parametrize("empty", [[], None])
def test_boxes_alone_are_enough_for_detectors_of_boxes(cells, tmp_path, empty):
    def boxes_alone(content):
        for entry in content["annotations"]:
            entry["segmentation"] = empty
            del entry["area"], entry["iscrowd"]

    root = respell(cells, tmp_path, boxes_alone)
    dataset = open_split(root, "train", masks=False)
    assert "masks" not in dataset.load(0)[1] and dataset.objects == len(dataset.ground_truth()["annotations"])
    results = [entry | {"score": 1.0} for entry in dataset.ground_truth()["annotations"]]
    assert numbers(evaluate_results(dataset.ground_truth(), results, "box", 1000))["AP"] == pytest.approx(100)
    with pytest.raises(UserError, match="--detector faster_rcnn"):
        open_split(root, "train", masks=True)


def test_annotations_of_crowds_alone_are_refused_for_training(cells, tmp_path):
    root = tmp_path / "data"
    respell(cells, root, lambda content: [entry.update(iscrowd=1) for entry in content["annotations"]])
    shutil.copy(cells / "annotations/instances_val2017.json", root / "annotations")
    (root / "val2017").symlink_to(cells / "val2017")
    with pytest.raises(UserError, match="instances_train2017.json: it has no object to train on"):
        main_detection.main([*RUN, "--data-path", str(root), "--output-dir", str(tmp_path / "run")])


def test_roboflows_layout_is_the_same_data(cells, tmp_path):
    for theirs, ours in (("train", "train"), ("valid", "val")):
        shutil.copytree(cells / f"{ours}2017", tmp_path / theirs)
        shutil.copy(cells / f"annotations/instances_{ours}2017.json", tmp_path / theirs / "_annotations.coco.json")
        found, expected = (open_split(root, ours, masks=True) for root in (tmp_path, cells))
        assert found.ground_truth() == expected.ground_truth() and len(found.load(0)[1]["boxes"]) > 0
    with pytest.raises(UserError, match="test/_annotations.coco.json"):
        open_split(tmp_path, "test", masks=True)


def test_images_are_upright_where_the_annotations_are_and_as_stored_where_those_are(tmp_path):
    (tmp_path / "train").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    stored = Image.fromarray(np.random.RandomState(0).randint(0, 256, (6, 8, 3), dtype=np.uint8))
    stored.save(tmp_path / "train/a.png", exif=exif)
    for expected in (stored, stored.transpose(Image.Transpose.ROTATE_270)):
        image = {"id": 1, "file_name": "a.png", "height": expected.height, "width": expected.width}
        content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "corner"}]}
        (tmp_path / "train/_annotations.coco.json").write_text(json.dumps(content))
        np.testing.assert_array_equal(open_split(tmp_path, "train", masks=False).image(0), expected)
    image["width"] += 3
    (tmp_path / "train/_annotations.coco.json").write_text(json.dumps(content))
    with pytest.raises(BadImage, match="EXIF orientation"):
        open_split(tmp_path, "train", masks=False).image(0)


# ----------------------------------------------------------------------------------------------- order, augmentation

GROUPS = np.random.RandomState(0).randint(0, 2, 103).astype(np.uint8)


@pytest.mark.parametrize(("world", "batch", "accum"), [(1, 4, 2), (2, 4, 1), (4, 1, 2)])
def test_updates_are_of_one_shape_but_for_the_last_on_any_number_of_processes(world, batch, accum):
    def updates(world, batch, accum, start=0):
        ranks = [
            list(GroupedSampler(len(GROUPS), batch, 3, rank, world, accum, groups=GROUPS).epoch(2, start))
            for rank in range(world)
        ]
        steps = [sorted(key.index for batch in step for key in batch) for step in zip(*ranks, strict=True)]
        return [sorted(sum(steps[i : i + accum], [])) for i in range(0, len(steps), accum)]

    expected = updates(1, 8, 1)
    assert updates(world, batch, accum) == expected
    assert updates(world, batch, accum, start=3 * accum) == expected[3:]
    used = [index for update in expected for index in update]
    assert len(set(used)) == len(used) == 96
    assert all(len(set(GROUPS[update])) == 1 for update in expected[:-1])
    assert len({GROUPS[update[0]] for update in expected[:5]}) == 2  # the groups alternate


@pytest.mark.parametrize(
    "flags",
    [["--min-size", "40,64", "--vflip", "0.5"], ["--min-size", "64", "--large-scale-jitter", "64"]],
    ids=["scales", "jitter"],
)
def test_augmentation_moves_boxes_masks_and_pixels_together(cells, tmp_path, flags):
    args = parse_args(Detection.flags, ["--data-path", str(cells), "--max-size", "100", *flags])
    transform, dataset = TrainTransform(args), open_split(cells, "train", masks=True)
    sizes = set()
    for index in range(len(dataset)):
        for draw in range(3):
            with seeded(draw):
                pixels, target = transform(*dataset.load(index))
            assert pixels.dtype == torch.uint8 and target["masks"].shape[1:] == pixels.shape[1:]
            assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
            sizes.add(tuple(pixels.shape))
            for box, mask in zip(target["boxes"], target["masks"], strict=True):
                rows, columns = mask.nonzero(as_tuple=True)
                if len(rows):  # the smallest objects may vanish at another scale
                    seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                    assert (box - seen).abs().max() < 3
    assert len(sizes) > 1 or "--large-scale-jitter" in flags


# ------------------------------------------------------------------------------------------------------- detectors


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["v2", "classic"])
@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("mask_rcnn", "spectformer_h_s"),
        ("mask_rcnn", "svt_h_s"),
        ("faster_rcnn", "resnet10t"),
        ("retinanet", "spectformer_h_s"),
        ("retinanet", "pvt_v2_b0"),
    ],
)
def test_every_parameter_of_every_detector_is_trained(kind, arch, heads):
    detector = small_detector(kind, arch, heads=heads).train()
    images, targets = zip(example(1), example(2, 96, 64, objects=1), strict=True)
    losses = detector(list(images), list(targets))
    sum(losses.values()).backward()
    idle = [name for name, weight in detector.named_parameters() if weight.grad is None]
    assert not idle
    detector.eval()
    (prediction,) = detector([images[0]])
    assert prediction["boxes"].shape == (len(prediction["labels"]), 4)
    if kind == "mask_rcnn":
        assert prediction["masks"].shape == (len(prediction["labels"]), 1, 64, 80)


@pytest.mark.slow
def test_an_image_without_objects_can_be_trained_on():
    detector = small_detector().train()
    image, target = example(1, objects=0)
    losses = detector([image], [target])
    sum(losses.values()).backward()
    assert float(losses["loss_mask"].detach()) == 0
    assert all(weight.grad is not None for weight in detector.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRIDES)
def test_in_half_precision_boxes_keep_their_place_to_a_part_of_a_pixel(kind):
    least = {"score_thresh" if kind == "retinanet" else "box_score_thresh": 0.0}
    detector = small_detector(kind, min_size=320, max_size=320, detections=200, **least).eval()
    for name, layer in detector.named_modules():
        if name.endswith(("bbox_pred", "bbox_reg")):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)  # so that boxes are the anchors
    anchors = []
    generator = (detector.network.rpn if hasattr(detector.network, "rpn") else detector.network).anchor_generator
    handle = generator.register_forward_hook(lambda _layer, _inputs, made: anchors.extend(made))
    with torch.no_grad():
        detector([torch.rand(3, 320, 320)])
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = detector([torch.rand(3, 320, 320)])
    inside = anchors[0].clamp(0, 320)
    assert len(found["boxes"]) > 9 and found["boxes"].max() > 256
    assert torch.cdist(found["boxes"], inside).amin(1).max() < 1e-3


def test_a_backbone_without_a_pyramid_is_refused():
    model = create_classifier("spectformer_ti", (64, 64), {"depth": 2, "alpha": 1}, 0.0)
    with pytest.raises(UserError, match="--arch spectformer_ti: a detector needs .* strides 4, 8, 16, 32"):
        pyramid_features(model, "spectformer_ti", STRIDES["mask_rcnn"])
    model = create_classifier("spectformer_h_n", (64, 64), {}, 0.0)
    with pytest.raises(UserError, match="has strides 2, 4, 8, 16; set --model-kwargs stem_stride=4"):
        pyramid_features(model, "spectformer_h_n", STRIDES["mask_rcnn"])


# ------------------------------------------------------------------------------------------------------------- runs

KWARGS = [f"{name}={value!r}".replace(" ", "") for name, value in SMALL.items()]
RUN = shlex.split(
    f"--arch spectformer_h_s --model-kwargs {' '.join(KWARGS)} --input-size 64 --min-size 64 --max-size 96 "
    "--detector-kwargs fpn_channels=32 anchor_sizes=(4,8,16,32,64) detections=40 box_score_thresh=0.0 "
    "rpn_post_nms_top_n_train=50 rpn_post_nms_top_n_test=40 --batch-size 4 --num-workers 0 --lr 2e-3 "
    "--warmup-updates 1 --warmup-lr 1e-3 --no-freeze-bn --device cpu"
)


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    directory = tmp_path_factory.mktemp("detection") / "run"
    flags = ["--data-path", str(cells), "--epochs", "2", "--decay-milestones", "1"]
    main_detection.main([*RUN, *flags, "--output-dir", str(directory)])
    return directory


def rows(directory):
    return [json.loads(line) for line in (directory / "log.txt").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_logs_the_numbers_of_boxes_and_masks_and_ranks_by_masks(trained):
    first, last = rows(trained)
    assert {"test_box_AP", "test_box_AP50", "test_mask_AP", "test_mask_AR"} <= last.keys()
    state = read_checkpoint(trained / "checkpoint_last.pth")
    assert state["AP"] == last["test_AP"] == last["test_mask_AP"] and state["class_names"][2] == "mitosis"
    assert last["train_loss"] < first["train_loss"]


@pytest.mark.slow
def test_the_rate_warms_up_by_updates_and_falls_after_its_milestone(trained):
    """The recipe's schedule over 12 epochs of 100 updates: 500 updates of warm-up, a tenth after epochs 8 and 11."""
    args = parse_args(Detection.flags, ["--data-set", "NUCLEI"], main_detection.RECIPES)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, rates = build_scheduler(args, optimizer, updates_per_epoch=100), []
    for update in range(1200):
        scheduler.step_update(max(update - 1, 0))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] == pytest.approx(0.001 * args.lr)
    np.testing.assert_allclose(np.diff(rates[1:501]), 0.999 * args.lr / 500, rtol=1e-6)
    for first, last, rate in ((501, 799, 1), (800, 1099, 0.1), (1100, 1199, 0.01)):
        np.testing.assert_allclose([rates[first], rates[last]], rate * args.lr)
    assert [round(row["train_lr"], 9) for row in rows(trained)] == [1e-3, 2e-4]  # the rate of each epoch's last update


@pytest.mark.slow
def test_infer_evaluates_a_checkpoint_as_training_did(trained, cells, tmp_path, capsys):
    path = trained / "checkpoint_last.pth"
    report = tmp_path / "report"
    flags = ["--data-path", str(cells), "--num-workers", "0", "--device", "cpu", "--min-score", "0.1"]
    infer.main(["--model-path", str(path), *flags, "--output", str(tmp_path / "r.json"), "--report", str(report)])
    found, logged = json.loads((tmp_path / "r.json").read_text()), rows(trained)[-1]
    for kind in ("box", "mask"):
        for name, value in found[kind].items():
            assert value == logged[f"test_{kind}_{name}"]
        results = json.loads((tmp_path / f"r_{kind}_results.json").read_text())
        stats = oracle(cells / "annotations/instances_val2017.json", results, kind).stats
        assert 100 * stats[0] == pytest.approx(found[kind]["AP"], abs=1e-6)
        assert (report / f"{kind}_by_category.csv").read_text().count("\n") == 4
        assert (report / f"{kind}_precision_recall.png").stat().st_size > 1000
    assert len(list(report.glob("worst_*.png"))) > 0
    assert "images/s" in capsys.readouterr().out


@pytest.mark.slow
def test_infer_draws_what_it_finds(trained, cells, tmp_path, capsys):
    path, images = trained / "checkpoint_last.pth", cells / "val2017"
    flags = ["--drawings", str(tmp_path / "drawn"), "--output", str(tmp_path / "o.json"), "--min-score", "0"]
    infer.main(["--model-path", str(path), "--image", str(images), "--device", "cpu", *flags])
    assert len(list((tmp_path / "drawn").glob("*_detections.png"))) == 4
    found = json.loads((tmp_path / "o.json").read_text())["predictions"]
    assert len(found) == 4 and "cell" in found[0]["objects"][0]["category"]
    with pytest.raises(UserError, match="--explain is for classifiers"):
        infer.main(["--model-path", str(path), "--image", str(images), "--explain", "--device", "cpu"])
    with pytest.raises(UserError, match="--data-set COCO: detectors take COCO with --data-path"):
        infer.main(["--model-path", str(path), "--data-set", "COCO", "--device", "cpu"])


@pytest.mark.slow
def test_finetuning_a_detector_keeps_its_class_layers_only_for_the_same_classes(trained, cells, tmp_path, capsys):
    path = str(trained / "checkpoint_last.pth")
    flags = ["--finetune", path, "--epochs", "1"]
    main_detection.main([*RUN, *flags, "--data-path", str(cells), "--output-dir", str(tmp_path / "same")])
    assert "not from it: nothing" in capsys.readouterr().out
    shutil.copytree(cells, tmp_path / "others")
    for file in (tmp_path / "others/annotations").iterdir():
        file.write_text(file.read_text().replace("mitosis", "platelet"))
    flags += ["--data-path", str(tmp_path / "others"), "--output-dir", str(tmp_path / "run")]
    main_detection.main([*RUN, *flags])
    printed = capsys.readouterr().out
    assert "not from it: network.roi_heads.box_predictor.cls_score.weight" in printed and "rpn" not in printed
    with pytest.raises(UserError, match="leave out --backbone-weights"):
        main_detection.main([*RUN, *flags, "--backbone-weights", path])


@pytest.mark.slow
def test_backbone_weights_come_from_a_classifier(cells, tmp_path, capsys):
    torch.manual_seed(7)
    classifier = create_classifier("spectformer_h_s", (64, 64), SMALL, 0.0)
    checkpoints.save(tmp_path / "classifier.pth", {"model": classifier.state_dict()})
    flags = ["--backbone-weights", str(tmp_path / "classifier.pth"), "--epochs", "1", "--lr", "0", "--warmup-lr", "0"]
    main_detection.main([*RUN, *flags, "--freeze-bn", "--data-path", str(cells), "--output-dir", str(tmp_path / "run")])
    weights = read_checkpoint(tmp_path / "run/checkpoint_last.pth")["model"]
    expected = classifier.state_dict()
    prefix = "network.backbone.body.model."
    shared = [name for name in expected if prefix + name in weights]
    assert len(shared) > 50 and all(torch.equal(weights[prefix + name], expected[name]) for name in shared)


@pytest.mark.slow
def test_the_embedded_cells_are_whole():
    for split, images in (("train", 114), ("val", 32)):
        cells = open_split(NUCLEI, split, masks=True)
        assert len(cells) == images and cells.without_area == 0 and cells.class_names == ("nucleus",)
        image, objects = cells.load(images - 1)
        assert image.size == (256, 256) and objects["masks"].any((1, 2)).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-set", "COCO"], "COCO needs --data-path"),
        (["--data-set", "NUCLEI", "--data-path", "/tmp"], "NUCLEI excludes it"),
        (["--compile"], "--compile: not supported for detectors"),
        (["--min-size", "800", "--max-size", "700"], "--max-size 700 is below"),
        (["--min-size", "800,600"], "not a list of ascending numbers"),
        (["--warmup-updates", "5", "--no-sched-on-updates"], "needs --sched-on-updates"),
        (["--detector-kwargs", "fpn_channels={}"], "--detector-kwargs: "),
        (["--detector-kwargs", "fpn_channels=40"], "--detector-kwargs: num_channels .40. must be divisible"),
        (["--detector-kwargs", "box_batch_size=3"], "MaskRCNN does not accept box_batch_size=3"),
        (["--detector-kwargs", "box_nms_thresh=much"], "MaskRCNN does not accept box_nms_thresh='much'"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main_detection.main([*flags, "--output-dir", str(tmp_path), "--device", "cpu"])


@pytest.mark.slow
def test_the_segmentation_example_of_the_docs_runs_on_wide_images():
    text = (Path(__file__).parent.parent / "docs/detection.md").read_text()
    names = {"images": torch.rand(2, 3, 64, 96)}
    exec(text.split("```python\n")[1].split("```")[0], names)
    logits = names["logits"]
    assert logits.shape == (2, 19, 64, 96)
    logits.square().mean().backward()
    grads = [weight.grad for name, weight in names["model"].named_parameters() if "complex_weight" in name]
    assert len(grads) == 7 and all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.slow
def test_masks_of_cells_come_back_from_their_boxes_to_where_they_were():
    """Masks are cropped like training targets, with boxes up to a pixel off, and pasted at twice the image size."""
    cells = open_split(NUCLEI, "val", masks=True)
    transform = small_detector().network.transform.eval()
    overlaps = []
    for index in range(4):
        _, objects = cells.load(index)
        truth, (height, width) = objects["masks"].as_subclass(torch.Tensor), objects["masks"].shape[1:]
        noise = torch.rand(objects["boxes"].shape, generator=torch.Generator().manual_seed(index))
        boxes = objects["boxes"].as_subclass(torch.Tensor) + 2 * noise - 1  # some boxes exceed the image
        masks = project_masks_on_boxes(truth.float(), boxes, torch.arange(len(boxes)), 28)[:, None]
        found = [{"boxes": 2 * boxes, "masks": masks}]
        (image,) = transform.postprocess(found, [(2 * height, 2 * width)], [(height, width)])
        pasted = image["masks"][:, 0] > 0.5
        overlaps.append((pasted & truth.bool()).sum((1, 2)) / (pasted | truth.bool()).sum((1, 2)))
    assert torch.cat(overlaps).mean() > 0.92
