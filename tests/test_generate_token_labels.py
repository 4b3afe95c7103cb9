import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from inputs.label_maps import MAP_SHAPE, read_label_map
from models.checkpoints import CheckpointError
from tools.generate_token_labels import label_maps, main, position_logits
from training.precision import Precision
from utils import UserError

CLASSES = ("ant", "bee", "cat")
PRECISION = Precision(torch.device("cpu"), torch.float32, None)


@pytest.fixture
def folder(tmp_path):
    """A data set of three classes, its images of several sizes, for training and validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for name in CLASSES:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40 + 9 * i, 70 - 7 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{name}_{i}.png")
    return tmp_path


def save_teacher(path, classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", num_classes=len(classes)).eval()
    known = {"arch": "test_resnet", "model_kwargs": {}, "input_size": [96, 96]}
    torch.save(known | {"model": model.state_dict(), "num_classes": len(classes), "class_names": list(classes)}, path)
    return model


@pytest.fixture
def run(folder):
    """Calls the tool with the data set, the teacher and the output folder filled in."""
    teacher = save_teacher(folder / "teacher.pth")

    def call(*flags, model=True):
        source = ["--model-path", str(folder / "teacher.pth")] if model else []
        folders = ["--data-path", str(folder / "data"), "--output-dir", str(folder / "maps")]
        main([*folders, *source, *["--num-workers", "0", "--batch-size", "5", "--device", "cpu"], *flags])

    call.teacher = teacher
    return call


def map_files(folder):
    return sorted((folder / "maps").rglob("*.pt"))


# ---------------------------------------------------------------------------------------- what a teacher says


@pytest.mark.parametrize(
    "name, options",
    [
        ("test_resnet", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "depths": (1, 1, 1, 1)}),
        ("spectformer_ti", {"img_size": 64, "depth": 2, "alpha": 1}),
    ],
)
def test_positions_classified_alone_average_to_the_models_logits(name, options):
    """True of every model that averages positions before a linear classifier."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = position_logits(model, images)
        torch.testing.assert_close(logits.mean((2, 3)), model(images), atol=1e-4, rtol=1e-4)
    assert logits.shape[:2] == (2, 7) and logits.shape[2] > 1


def test_prefix_tokens_are_not_positions():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=1, num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, 2:]
        expected = (model.head(tokens) + model.head_dist(tokens)) / 2
        torch.testing.assert_close(position_logits(model, images).flatten(2).mT, expected)


class Painter(nn.Module):
    """Says 0, 1, 2, 3 in the quarters of the image, by its colours."""

    num_classes = 4

    def forward_features(self, images):
        return nn.functional.avg_pool2d(images, 16)

    def forward_head(self, features):
        red, green, _ = features.flatten(1).T
        above, left = 1 - green, 1 - red
        return 9 * torch.stack([left * above, red * above, left * green, red * green], dim=1)


def test_maps_lie_like_the_image():
    images = torch.zeros(1, 3, 288, 288)
    images[:, 0, :, 144:] = 1  # red on the right
    images[:, 1, 144:] = 1  # green below
    (label_map,) = label_maps(Painter(), images, PRECISION)
    assert label_map.shape == MAP_SHAPE and label_map.dtype == torch.float16
    quarters = label_map[1, 0].unflatten(0, (2, 9)).unflatten(2, (2, 9))
    for number, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert (quarters[row, :, column] == number).all()
    assert (label_map[0, 0] == 9).all() and (label_map[0, 1:4] == 0).all()


# ---------------------------------------------------------------------------------------------------- writing


def test_every_training_image_gets_the_teachers_map(folder, run, capsys):
    run()
    assert [file.relative_to(folder / "maps").as_posix() for file in map_files(folder)] == [
        f"{name}/{name}_{i}.pt" for name in CLASSES for i in range(4)
    ]
    image = Image.open(folder / "data" / "train" / "bee" / "bee_2.png")
    cfg = timm.get_pretrained_cfg("test_resnet")
    pixels = timm.data.create_transform(
        96, crop_pct=1.0, crop_mode="squash", interpolation=cfg.interpolation, mean=cfg.mean, std=cfg.std
    )(image)
    (expected,) = label_maps(run.teacher, pixels[None], PRECISION)
    found = read_label_map(folder / "maps" / "bee" / "bee_2.pt", len(CLASSES))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    run("--check", model=False)
    assert "12 label maps" in capsys.readouterr().out.splitlines()[-1]


def test_a_second_call_writes_only_what_is_missing(folder, run, capsys):
    run()
    files = map_files(folder)
    before = {file: file.read_bytes() for file in files}
    files[1].unlink()
    files[7].write_bytes(b"kept")
    run()
    assert {file: file.read_bytes() for file in map_files(folder)} == before | {files[7]: b"kept"}
    assert capsys.readouterr().out.endswith("maps, 1 of them new\n")


def test_a_teacher_of_other_classes_is_refused(folder, run):
    save_teacher(folder / "teacher.pth", ("ant", "cat", "bee"))
    with pytest.raises(UserError, match="are not the 3 classes of --data-set FOLDER"):
        run()


def test_check_names_missing_and_mismatched_maps(folder, run):
    run()
    files = map_files(folder)
    label_map = read_label_map(files[3], len(CLASSES))
    label_map[1, 4] = 3
    torch.save(label_map, files[3])
    with pytest.raises(UserError, match="not a label map of 3 classes: its indices"):
        run("--check", model=False)
    files[0].unlink()
    with pytest.raises(UserError, match="1 of 12 label maps are missing"):
        run("--check", model=False)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "either --model-path CKPT or --pretrained --arch NAME"),
        (["--pretrained"], "either --model-path CKPT or --pretrained --arch NAME"),
        (["--pretrained", "--model-path", "c.pth"], "either --model-path CKPT or --pretrained --arch NAME"),
        (["--pretrained", "--arch", "resnet18"], "no pretrained weights of this model for the 3 classes"),
        (["--pretrained", "--arch", "nonsense"], "no pretrained weights"),
        (["--model-path", "nowhere.pth"], "nowhere.pth"),
        (["--check"], "label maps are missing"),
    ],
)
def test_bad_command_lines_get_one_line(run, flags, message):
    with pytest.raises((UserError, CheckpointError), match=message) as error:
        run(*flags, model=False)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_bad_image_is_named(folder, run):
    bad = folder / "data" / "train" / "cat" / "cat_1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(UserError, match="cat_1.png"):
        run("--num-workers", "1")


def test_two_images_do_not_share_a_map(folder, run):
    Image.new("RGB", (8, 8)).save(folder / "data" / "train" / "ant" / "ant_1.jpg")
    with pytest.raises(UserError, match=r"2 images would share the label map .*ant_1\.pt"):
        run()
