"""infer.py: a model from its checkpoint alone, evaluation, prediction, reports, explanations."""

import csv
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torch import nn

import infer
import models
from datasets import build_eval
from inference import explanations, prediction, recognise, reports
from inference.from_checkpoint import build_from_checkpoint
from inference.mirrored import average_mirrored
from models.checkpoints import CheckpointError, read_checkpoint
from runtime.processes import Distributed
from tests.golden import recipe
from tests.untrained import PYRAMID, VANILLA, save
from utils import MachineError, UserError

GOLDEN = Path(__file__).parent / "golden"


def run(*words):
    infer.main([str(word) for word in words] + ["--num-workers", "0", "--device", "cpu"])


def photographs(folder):
    folder.mkdir()
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
    return folder


def bare(variant):
    """The weights of a published variant as the authors store them."""
    weights = recipe.state_dict(GOLDEN / f"{variant}.keys.json")
    return {name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()}


@pytest.mark.parametrize(
    ("variant", "arch", "arguments"),
    [
        ("spectformer_xs", "spectformer_xs", {"alpha": 4}),
        ("spectformer_h_s_no_token_label", "spectformer_h_s", {"spectral_depths": (3, 4, 0, 0)}),
        (
            "svt_h_l",
            "svt_h_l",
            {"spectral_depths": (3, 0, 0, 0), "token_label": True, "mixing": "channel"},
        ),
        (
            "svt_h_s_alpha2",
            "svt_h_s",
            {"spectral_depths": (3, 4, 0, 0), "token_label": True, "mixing": "channel"},
        ),
        (
            "svt_h_s_channel_token",
            "svt_h_s",
            {"spectral_depths": (3, 0, 0, 0), "token_label": True, "mixing": "channel_token"},
        ),
    ],
)
def test_bare_weights_of_the_authors_show_their_model(variant, arch, arguments):
    names = json.loads((GOLDEN / f"{variant}.keys.json").read_text())
    with torch.device("meta"):
        ours = models.to_ours({name: torch.empty(shape) for name, shape in names.items()})
    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    assert recognise.recognise(shapes) == ((arch,), arguments, "")
    assert recognise.native_size(shapes) == (224, 224)


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("spectformer_ti", (224, 160)),
        ("spectformer_h_s", (384, 384)),
        ("svt_h_s", (96, 224)),
        ("svt_vanilla_ti", (256, 192)),
    ],
)
def test_bare_weights_of_another_resolution_show_it(arch, size):
    with torch.device("meta"):
        model = timm.create_model(arch, img_size=size)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert recognise.recognise(shapes).names == (arch,)
    assert recognise.native_size(shapes) == size


def bare_weights_of(path, arch, arguments):
    """Saves a model's weights without a word about them; returns the model."""
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=10, **arguments).eval()
    torch.save(model.state_dict(), path)
    return model


@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("spectformer_h_n", {}),
        ("svt_h_n", {"mixing": "tensor"}),
        ("svt_h_n", {"mixing": "token_half", "spectral_depths": (0, 1, 0, 0)}),
        ("svt_h_n", {"mixers": "fno/afno,scattering_channel/conv*3/attention", "img_size": 64}),
        ("spectformer_ti", {"mixers": "attention*2,spectral*10", "patch_size": 8, "img_size": (32, 48)}),
    ],
    ids=str,
)
def test_bare_weights_show_the_mixers_patches_and_strides_of_their_model(arch, arguments, tmp_path):
    expected = bare_weights_of(tmp_path / "bare.pth", arch, arguments)
    model, info = build_from_checkpoint(tmp_path / "bare.pth")
    images = torch.randn(1, 3, *expected.img_size)
    assert info.arch == arch and info.input_size == expected.img_size
    assert torch.equal(model(images), expected(images))


def test_of_mixers_without_weights_it_is_said_what_to_give(tmp_path):
    path = tmp_path / "bare.pth"
    expected = bare_weights_of(path, "spectformer_h_n", {"mixers": "pool/spectral,pool/attention*3/attention"})
    mixers = r"none\*1/spectral\*1,none\*1/attention\*3/attention\*1"
    with pytest.raises(
        UserError, match=rf"{path}: .*spectformer_h_n.*block 1 of stage 1.*--model-kwargs mixers={mixers}"
    ):
        build_from_checkpoint(path)
    model, _ = build_from_checkpoint(path, model_kwargs={"mixers": "pool/spectral,pool/attention*3/attention"})
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), expected(images))


def test_a_stride_that_bare_weights_cannot_show_is_taken_from_the_command_line(tmp_path):
    bare_weights_of(tmp_path / "bare.pth", "spectformer_h_n", {"stem_stride": 1})
    _, info = build_from_checkpoint(tmp_path / "bare.pth", model_kwargs={"stem_stride": 1})
    assert info.input_size == (32, 32)


def test_a_bare_file_gives_the_golden_logits(tmp_path):
    path = tmp_path / "authors.pth"
    weights = {f"module.{name}": value for name, value in bare("spectformer_ti").items()}
    torch.save({"model": {"state_dict": weights}}, path)
    model, info = build_from_checkpoint(path)
    golden = np.load(GOLDEN / "spectformer_ti.npz")["logits"]
    images = torch.from_numpy(recipe.images(len(golden), 224, 224))
    with torch.no_grad():
        assert np.abs(model(images).numpy() - golden).max() <= 2e-4
    assert (info.arch, info.num_classes, info.crop_pct) == ("spectformer_ti", 1000, 0.875)
    assert info.class_name(0) == "n01440764 tench"


def test_our_checkpoint_tells_model_classes_and_preprocessing(tmp_path):
    kwargs = PYRAMID | {"mixing": "token", "token_label": True}
    saved = save(tmp_path / "a.pth", "svt_h_s", kwargs, ("cat", "dog"), (64, 96))
    model, info = build_from_checkpoint(tmp_path / "a.pth", "svt-s")
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(image), saved(image))
    assert info.class_names == ("cat", "dog") and info.input_size == (64, 96)
    assert (info.mean, info.crop_pct, info.interpolation) == ((0.5, 0.5, 0.5), 1.0, "bilinear")


def test_another_input_size_resizes_the_weights(tmp_path):
    save(tmp_path / "a.pth")
    model, info = build_from_checkpoint(tmp_path / "a.pth", input_size=(64, 48))
    assert info.input_size == (64, 48) and model.pos_embed.shape[1] == 12
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 48)).shape == (1, 10)


def test_the_averaged_weights_are_used_where_there_are_any(tmp_path):
    trained = timm.create_model("spectformer_ti", num_classes=10, img_size=32, **VANILLA).state_dict()
    averaged = {name: value + 1 for name, value in trained.items()}
    save(tmp_path / "a.pth", model=trained, model_ema=averaged)
    for flag, expected in ((None, averaged), (True, averaged), (False, trained)):
        model, info = build_from_checkpoint(tmp_path / "a.pth", ema=flag)
        assert torch.equal(model.norm.bias, expected["norm.bias"])
        assert info.ema == (expected is averaged)
    save(tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="no-ema"):
        build_from_checkpoint(tmp_path / "b.pth", ema=True)


def test_a_model_of_timms_is_evaluated_too(tmp_path):
    torch.manual_seed(0)
    peer = timm.create_model("resnet10t", num_classes=7)
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    model, info = build_from_checkpoint(tmp_path / "peer.pth", "resnet10t", input_size=(64, 64))
    assert info.num_classes == 7
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 3, 64, 64)), peer.eval()(torch.ones(1, 3, 64, 64)))


@pytest.mark.parametrize("arch", ["svt-h-s", "spectformer-xs", "resnet18", "no_such_model"])
def test_an_arch_that_contradicts_the_checkpoint_is_refused(tmp_path, arch):
    save(tmp_path / "ours.pth")
    with pytest.raises(UserError, match=f"it holds spectformer_ti, not --arch {arch}"):
        build_from_checkpoint(tmp_path / "ours.pth", arch)


def test_an_arch_that_contradicts_bare_weights_is_refused(tmp_path):
    model = timm.create_model("spectformer_ti", num_classes=2, img_size=32)
    torch.save(models.to_original(model.state_dict()), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="it holds spectformer_ti, not --arch deit_tiny"):
        build_from_checkpoint(tmp_path / "bare.pth", "deit_tiny")
    torch.save(timm.create_model("resnet10t", num_classes=2).state_dict(), tmp_path / "peer.pth")
    with pytest.raises(UserError, match="it holds other weights, not --arch svt-s"):
        build_from_checkpoint(tmp_path / "peer.pth", "svt-s")


def test_bare_weights_of_an_own_size_need_to_be_told_their_arguments(tmp_path):
    model = timm.create_model("spectformer_ti", num_classes=2, img_size=32, **VANILLA).eval()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="--arch .*--model-kwargs"):
        build_from_checkpoint(tmp_path / "bare.pth")
    again, _ = build_from_checkpoint(tmp_path / "bare.pth", "spectformer_ti", model_kwargs=VANILLA)
    with torch.no_grad():
        assert torch.equal(again(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"num_classes": 4}, "head.weight"),
        ({"class_names": ["a"]}, "names 1 classes"),
        ({"input_size": [32, 32, 32]}, "input_size"),
        ({"mean": [0.5]}, "mean"),
        ({"model_kwargs": {"no_such_argument": 1}}, "no_such_argument"),
        ({"arch": "spectformer_h_s"}, "embed_dim"),
        ({"model": {"head.weight": torch.ones(10, 3)}}, "missing"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused_by_name(tmp_path, damage, named):
    save(tmp_path / "a.pth", instead=damage)
    with pytest.raises(UserError, match=named) as caught:
        build_from_checkpoint(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


def test_evaluation_writes_what_it_prints(tmp_path, capsys):
    model = save(tmp_path / "a.pth", args={"data_set": "DIGITS"})
    run("--model-path", tmp_path / "a.pth", "--report", tmp_path / "report", "--batch-size", "50")
    results = json.loads((tmp_path / "a_digits.json").read_text())
    printed = capsys.readouterr().out
    assert f"acc@1 {results['acc1']:.2f} %" in printed and f"loss {results['loss']:.4f}" in printed
    assert results["images"] == 360 and results["arch"] == "spectformer_ti"

    rows = list(csv.reader((tmp_path / "report" / "confusion_matrix.csv").open()))
    counts = np.array([row[1:] for row in rows[1:]], dtype=int)
    assert counts.sum() == 360 and counts.trace() == results["correct1"]
    classes = list(csv.DictReader((tmp_path / "report" / "per_class.csv").open()))
    assert [int(row["correct"]) for row in sorted(classes, key=lambda row: int(row["index"]))] == [*counts.diagonal()]
    mean = np.mean([int(row["correct"]) / int(row["images"]) for row in classes])
    assert results["mean_per_class"] == pytest.approx(100 * mean)
    with Image.open(tmp_path / "report" / "confusion_matrix.png") as picture:
        assert picture.width > 500

    # The digits are all of one model: a fresh loop over them, without any of infer's code, agrees.
    dataset = build_eval(
        infer.settle(
            infer.build_parser().parse_args(["--model-path", "x", "--num-workers", "0"]),
            build_from_checkpoint(tmp_path / "a.pth")[1],
        ),
        Distributed(),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        interpolation="bilinear",
    ).val
    with torch.no_grad():
        correct = sum(int((model(batch.images).argmax(1) == batch.targets).sum()) for batch in dataset)
    assert correct == results["correct1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-workers", "4611686018427387904"], "--num-workers.*at most 1024"),  # each would be a process
        (["--model-path", ""], "--model-path: '' names nothing"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(words, expected):
    with pytest.raises(UserError, match=expected) as caught:
        infer.main(words)
    assert "\n" not in str(caught.value)


def test_mirrored_images_have_their_part_in_the_logits(tmp_path, capsys):
    model = save(tmp_path / "a.pth", args={"data_set": "DIGITS"})
    images = torch.randn(2, 3, 32, 32)
    expected = (model(images) + model(images.flip(-1))) / 2
    average_mirrored(model)
    assert torch.allclose(model(images), expected) and not torch.allclose(model(images), model.forward(images))
    run("--model-path", tmp_path / "a.pth", "--tta")
    assert "spectformer_ti, mirrored too, on DIGITS" in capsys.readouterr().out
    assert json.loads((tmp_path / "a_digits.json").read_text())["tta"]
    with pytest.raises(UserError, match="--explain is about one image"):
        run("--model-path", tmp_path / "a.pth", "--tta", "--explain", "--image", tmp_path)


def test_images_that_training_held_back_are_those_that_are_evaluated(tmp_path):
    for number in range(20):
        path = tmp_path / "tree" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    held_back = {"data_set": "FOLDER", "val_split": [0.2, 3]}
    save(tmp_path / "a.pth", args=held_back, classes=("0", "1"))
    run("--model-path", tmp_path / "a.pth", "--data-path", tmp_path / "tree")
    assert json.loads((tmp_path / "a_folder.json").read_text())["images"] == 4
    run("--model-path", tmp_path / "a.pth", "--data-path", tmp_path / "tree", "--val-split", "0.5")
    assert json.loads((tmp_path / "a_folder.json").read_text())["images"] == 10


def test_a_results_file_is_replaced_and_nothing_else(tmp_path):
    save(tmp_path / "a.pth", args={"data_set": "DIGITS", "classes": ["0", "1"]}, classes=("0", "1"))
    run("--model-path", tmp_path / "a.pth")
    run("--model-path", tmp_path / "a.pth")
    precious = tmp_path / "notes.json"
    precious.write_text("[1, 2]")
    with pytest.raises(UserError, match="notes.json"):
        run("--model-path", tmp_path / "a.pth", "--output", precious)
    with pytest.raises(UserError, match="a.pth"):
        run("--model-path", tmp_path / "a.pth", "--output", tmp_path / "a.pth")
    assert precious.read_text() == "[1, 2]"


def test_a_checkpoint_is_read_once(tmp_path, monkeypatch):
    save(tmp_path / "a.pth")
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    read = []
    monkeypatch.setattr(infer, "read_checkpoint", lambda path: read.append(path) or read_checkpoint(path))
    run("--model-path", tmp_path / "a.pth", "--image", tmp_path / "image.png")
    assert read == [tmp_path / "a.pth"]


def test_classes_that_are_not_the_checkpoints_are_refused(tmp_path):
    save(tmp_path / "three.pth", classes=("0", "1", "2"))
    with pytest.raises(UserError, match="10 classes.*knows 3.*--classes"):
        run("--model-path", tmp_path / "three.pth", "--data-set", "DIGITS")
    with pytest.raises(UserError, match="class 0 is '2'.*it is '0'"):
        run("--model-path", tmp_path / "three.pth", "--data-set", "DIGITS", "--classes", "2,1,0")


def test_several_processes_count_every_image_once(tmp_path):
    save(tmp_path / "a.pth", args={"data_set": "DIGITS"})
    words = ["--model-path", str(tmp_path / "a.pth"), "--num-workers", "0", "--batch-size", "7"]
    run(*words, "--output", tmp_path / "one.json")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        infer.__file__,
        *words,
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "two.json"),
    ]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    printed = [process.communicate(timeout=180)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert "acc@1" in printed[0] and not printed[1]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    for count in ("images", "correct1", "correct5", "mean_per_class"):
        assert one[count] == two[count]


def test_prediction_lists_as_many_classes_as_there_are(tmp_path, capsys):
    folder = photographs(tmp_path / "photographs")
    model = save(tmp_path / "a.pth", classes=("temple", "plant", "other"))
    run("--model-path", tmp_path / "a.pth", "--image", folder, "--output", tmp_path / "out.json")
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("/")] == [
        str(folder / "china.jpg"),
        str(folder / "flower.jpg"),
    ]
    first = json.loads((tmp_path / "out.json").read_text())["predictions"][0]["classes"]
    assert {entry["class"] for entry in first} == {"temple", "plant", "other"}
    assert sum(entry["probability"] for entry in first) == pytest.approx(1, abs=1e-5)

    transform = create_transform((32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, interpolation="bilinear")
    with torch.no_grad(), Image.open(folder / "china.jpg") as image:
        expected = model(transform(image)[None]).softmax(1).max()
    assert first[0]["probability"] == pytest.approx(float(expected), abs=1e-5)


def test_a_photograph_is_turned_upright_first(tmp_path):
    save(tmp_path / "a.pth")
    photograph = Image.fromarray(load_sample_images().images[0])
    photograph.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for name in ("upright", "turned"):
        run(
            "--model-path",
            tmp_path / "a.pth",
            "--image",
            tmp_path / f"{name}.png",
            "--output",
            tmp_path / f"{name}.json",
        )
    upright, turned = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("upright", "turned"))
    assert upright["predictions"][0]["classes"] == turned["predictions"][0]["classes"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--image", "missing.png"], "missing.png"),
        (["--image", "empty"], "empty"),
        (["--image", "broken.png"], "broken.png"),
        (["--image", "a.pth"], "a.pth: cannot be read as an image: Pillow does not know its format"),
        (["--explain"], "--explain needs --image"),
        (["--image", "good.png", "--data-set", "DIGITS"], "--image"),
        (["--data-set", "MNIST"], "MNIST"),
        (["--data-set", "CIFAR10"], "--data-path"),
        (["--input-size", "0"], "--input-size"),
        (["--modle-kwargs", "a=1"], "--modle-kwargs"),
    ],
)
def test_bad_input_is_one_line_that_names_it(tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    save("a.pth")
    Path("empty").mkdir()
    Image.new("RGB", (40, 40)).save("good.png")
    Path("broken.png").write_bytes(Path("good.png").read_bytes()[:60])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=named) as caught:
        run("--model-path", "a.pth", *words)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("part", ["0", "1e-300", "1.5", "nan"])
def test_a_crop_that_leaves_nothing_is_refused_not_ignored(tmp_path, part):
    save(tmp_path / "a.pth", args={"data_set": "DIGITS"})
    with pytest.raises(UserError, match="--eval-crop-pct"):
        run("--model-path", tmp_path / "a.pth", "--eval-crop-pct", part)


@pytest.mark.parametrize(
    ("words", "error", "named"),
    [
        (["--output", "nowhere/results.json"], UserError, "nowhere"),
        (["--output", "a.pth/results.json"], UserError, "a.pth"),
        (["--output", "/proc/results.json"], MachineError, "/proc"),
        (["--report", "a.pth"], UserError, "a.pth"),
        (["--report", "/proc/self"], MachineError, "/proc/self"),
        (["--image", "good.png", "--output", "/proc/results.json"], MachineError, "/proc"),
        (["--image", "good.png", "--explain", "/proc/self"], MachineError, "/proc/self"),
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_work(tmp_path, monkeypatch, words, error, named):
    monkeypatch.chdir(tmp_path)
    save("a.pth", args={"data_set": "DIGITS"})
    Image.new("RGB", (40, 40)).save("good.png")
    monkeypatch.setattr(nn.Module, "__call__", lambda *args, **kwargs: pytest.fail("the model was run"))
    with pytest.raises(error, match=named):
        run("--model-path", "a.pth", *words)


def test_names_reach_the_terminal_without_their_escape_sequences(tmp_path, capsys):
    folder = tmp_path / "\x1b[2J"
    folder.mkdir()
    place = os.fsencode(folder) + b"/caf\xe9\n.png"
    with open(place, "wb") as file:
        Image.new("RGB", (40, 40)).save(file, "png")
    save(tmp_path / "a.pth", classes=("\x1b]0;title\x07", "\ud800", "\u202etxt"))
    run("--model-path", tmp_path / "a.pth", "--image", os.fsdecode(place), "--explain", "--output", tmp_path / "o.json")
    printed = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in printed) and printed.count("\n") == 5
    assert "\\x1b[2J/caf\\udce9\\n.png" in printed and "\\x1b]0;title\\x07" in printed
    assert json.loads((tmp_path / "o.json").read_text())["predictions"][0]["image"] == os.fsdecode(place)


def test_names_in_tables_are_no_formulas(tmp_path):
    names = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "plain = 1"]
    reports.write_report(tmp_path, np.array([range(7), [1, 0, 2, 3, 4, 5, 6]]), names, "=a model")
    for file in ("confusion_matrix.csv", "per_class.csv"):
        with (tmp_path / file).open(newline="") as opened:
            cells = [cell for row in csv.reader(opened) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
        assert {"'=1+1", "'-1", "\\t=1", "\\r=1", "plain = 1"} <= set(cells)


def test_results_are_written_though_nobody_listens(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path / "a.pth", args={"data_set": "DIGITS"})
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=full, flush=full, encoding="utf-8"))
    run("--model-path", tmp_path / "a.pth", "--report", tmp_path / "report")
    assert (tmp_path / "a_digits.json").exists() and (tmp_path / "report" / "per_class.csv").exists()


def test_the_true_class_is_told_where_the_images_folder_is_a_class(tmp_path, capsys):
    save(tmp_path / "a.pth", classes=("cat", "dog"))
    for folder in ("dog", "holiday"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / folder / f"{folder}.png")
    images = [tmp_path / "dog", tmp_path / "holiday"]
    run("--model-path", tmp_path / "a.pth", "--image", *images, "--output", tmp_path / "out.json")
    known, unknown = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert known["true"] == {"index": 1, "class": "dog"} and "true" not in unknown
    assert [
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("    ") and "%" not in line
    ] == [["true", "dog"]]
    assert prediction.summary(known).endswith("true dog") and "true" not in prediction.summary(unknown)


def test_a_wordnet_id_that_is_not_of_imagenet_is_told_as_it_is(tmp_path):
    save(tmp_path / "a.pth", classes=("n01440764", "n99999999"))
    _, info = build_from_checkpoint(tmp_path / "a.pth")
    assert [info.class_name(i) for i in range(2)] == ["n01440764 tench", "n99999999"]


@pytest.mark.parametrize("size", [(56, 56), (32, 64)])
def test_the_explanation_marks_where_the_evidence_is(size):
    torch.manual_seed(0)
    image = torch.randn(3, *size)
    height, width = size
    image[:, height // 2 :, : width // 2] += 4

    def lower_left_is_bright(images):
        place = images[:, :, height // 2 :, : width // 2].mean((1, 2, 3))
        return torch.stack([-place, place, torch.zeros_like(place)], 1)

    heat = explanations.class_evidence(lower_left_is_bright, image, 1, batch_size=7)
    rows, columns = heat.shape
    inside = heat[rows // 2 :, : columns // 2]
    assert heat.max() == 1 and inside.max() == 1 and heat.min() >= 0
    assert inside.sum() > 0.7 * heat.sum()
    assert heat[: rows // 2 - explanations.HIDDEN + 1].eq(0).all()  # no square that touches these rows hides anything
    assert explanations.class_evidence(lower_left_is_bright, image, 0, batch_size=7).eq(0).all()  # all of it is against


@pytest.mark.parametrize(
    ("name", "options", "classifier"),
    [
        ("spectformer_ti", {"embed_dim": 64, "depth": 1, "alpha": 1}, "head"),
        ("svt_h_s", {"depths": (1, 1, 1, 1)}, "head"),
        ("svt_h_s", {"depths": (1, 1, 1, 1), "token_label": True}, "aux_head"),
    ],
)
def test_class_activation_is_where_the_tokens_classifier_says_the_class(name, options, classifier, monkeypatch):
    model = timm.create_model(name, img_size=(64, 96), num_classes=3, **options).eval()
    direction = model.get_submodule(classifier).weight[1].detach()
    prefix, columns = model.num_prefix_tokens, 96 // model.feature_info[-1]["reduction"]
    rows = 64 // model.feature_info[-1]["reduction"]
    tokens = torch.zeros(1, prefix + rows * columns, model.num_features)
    tokens[0, prefix + columns + 2] = 9 * direction / direction.norm()  # second row, third column
    monkeypatch.setattr(model, "forward_features", lambda images: tokens)
    heat = explanations.class_activation(model, torch.zeros(1, 3, 64, 96), 1)
    assert heat.shape == (rows, columns) and heat.argmax() == columns + 2 and heat.max() == 1
    assert heat.sum() < 1.2 and heat.min() == 0 and explanations.class_activation(model, tokens, 0).max() <= 1


def test_overlays_are_written_and_replace_no_image(tmp_path):
    folder = photographs(tmp_path / "photographs")
    save(tmp_path / "a.pth")
    run("--model-path", tmp_path / "a.pth", "--image", folder, "--explain")
    assert sorted(path.name for path in (tmp_path / "explained").iterdir()) == [
        "china_explained.png",
        "flower_explained.png",
    ]
    before = {path: path.read_bytes() for path in (tmp_path / "explained").iterdir()}
    same = tmp_path / "china.png"
    Image.new("RGB", (8, 8)).save(same)
    with pytest.raises(UserError, match="same name"):
        run("--model-path", tmp_path / "a.pth", "--image", folder, same, "--explain")
    Image.new("RGB", (8, 8)).save(tmp_path / "explained" / "china_explained_explained.png")
    with pytest.raises(UserError, match="would replace one of the images"):
        run("--model-path", tmp_path / "a.pth", "--image", tmp_path / "explained", "--explain")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_colours_of_an_explanation_are_those_of_the_bar_beside_it():
    grey = torch.full((8, 8, 3), 0.5)
    figure = explanations.draw_overlay(grey, {"map": torch.tensor([[1.0, 0.5], [0.0, 0.0]])}, "dog")
    FigureCanvasAgg(figure).draw()
    picture = np.asarray(figure.canvas.buffer_rgba())
    _, overlay, bar = figure.axes

    def colour(axes, right, up):
        place = axes.get_window_extent()
        x, y = place.x0 + right * place.width, len(picture) - place.y0 - up * place.height
        return picture[int(y), int(x)].astype(int)

    for on_map, on_bar in [((0.25, 0.75), 0.995), ((0.75, 0.75), 0.5), ((0.5, 0.25), 0.005)]:
        assert abs(colour(overlay, *on_map) - colour(bar, 0.5, on_bar)).max() <= 4


@pytest.mark.parametrize("classes", [2, 40, 150])
def test_a_confusion_matrix_of_any_size_is_drawn(tmp_path, classes):
    rng = np.random.default_rng(0)
    true = rng.integers(classes, size=classes * 30)
    predicted = np.where(rng.random(true.size) < 0.7, true, rng.integers(classes, size=true.size))
    true[true == 1] = 0  # a class without images
    reports.write_report(tmp_path, np.stack([true, predicted]), [f"class {i}" for i in range(classes)], "a model")
    last = list(csv.DictReader((tmp_path / "per_class.csv").open()))[-1]
    assert last["class"] == "class 1" and last["accuracy"] == "nan"
    with Image.open(tmp_path / "confusion_matrix.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
