"""Unreadable images are refused by name, or skipped and counted on request; unusual formats are decoded correctly."""

import io
import json
import multiprocessing
import os
import signal
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import arguments, make_tree

from inputs.data import build_data
from inputs.images import BadImage, read_image
from runtime.processes import Distributed
from tools import verify_dataset
from training.classification import evaluate
from training.precision import Precision
from utils import UserError


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(mode="RGB", size=(40, 30)) -> Image.Image:
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """Encode an RGB image from raw rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


UNREADABLE = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "truncated jpeg": encoded(photo(), "jpeg")[:-300],
    "truncated png": encoded(photo(), "png")[:-200],
    "bomb": png(20_000, 20_000, 8, b""),
    "floats": encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "tiff"),
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_files_are_refused_by_name_in_one_line(tmp_path, content):
    path = tmp_path / "image.JPEG"
    path.write_bytes(content)
    for bad in (path, tmp_path / "gone.jpg", tmp_path):
        with pytest.raises(BadImage, match=f"^{bad}: cannot be read as an image: ") as caught:
            read_image(str(bad))
        assert "\n" not in str(caught.value)


MODES = "L jpeg, CMYK jpeg, RGBA png, LA png, P png, 1 png, RGB bmp, P gif"


@pytest.mark.parametrize("case", MODES.split(", "))
def test_odd_modes_with_a_wrong_extension_give_torchvisions_pixels(tmp_path, case):
    mode, kind = case.split()
    path = tmp_path / "image.JPEG"
    path.write_bytes(encoded(photo(mode), kind))
    image = read_image(str(path))
    with Image.open(path) as file:
        expected = np.asarray(file.convert("RGB"))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected)
    if kind in ("png", "bmp"):
        assert np.array_equal(expected, np.asarray(photo(mode).convert("RGB")))


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = np.asarray(read_image(io.BytesIO(encoded(Image.fromarray(ramp), kind)), "ramp"))
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 0.5
    assert (pixels == pixels[..., :1]).all()


def test_a_range_keeps_the_levels_of_twelve_bits_and_without_it_they_are_not_lost_in_silence():
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    content = encoded(Image.fromarray(levels), "png")
    with pytest.raises(BadImage, match="like 12-bit values; set --pixel-range MIN MAX"):
        read_image(io.BytesIO(content), "scan.png")
    for channels in (1, 3, 4):
        pixels = np.asarray(read_image(io.BytesIO(content), "scan.png", channels=channels, pixel_range=(0, 4095)))
        grey = pixels if channels == 1 else pixels[..., 0]
        assert len(np.unique(grey)) == 256 and np.abs(grey - levels / 4095 * 255).max() <= 0.5
    narrow = np.asarray(read_image(io.BytesIO(content), "scan.png", channels=1, pixel_range=(1000, 1255)))
    assert narrow.ravel()[[0, 1000, 1007, 1255, 4095]].tolist() == [0, 0, 7, 255, 255]
    floats = encoded(Image.fromarray(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)), "tiff")
    assert np.asarray(read_image(io.BytesIO(floats), "x", pixel_range=(-1, 1)))[[0, -1], [0, -1], 0].tolist() == [
        0,
        255,
    ]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_grey_and_alpha_stay_where_the_model_takes_them(channels, mode):
    content = encoded(photo(mode), "png")
    image = read_image(io.BytesIO(content), "x", channels=channels)
    assert image.mode == mode and np.array_equal(np.asarray(image), np.asarray(photo(mode)))


def test_exif_orientation_turns_photographs_but_not_data_sets():
    turned = Image.Exif()
    turned[0x0112] = 6
    content = encoded(photo(), "jpeg", exif=turned)
    assert read_image(io.BytesIO(content), "photo").size == (40, 30)
    upright = read_image(io.BytesIO(content), "photo", upright=True)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(read_image(io.BytesIO(content), "p")), -1))


# ---------------------------------------------------------------------------------------------------- loading


@pytest.fixture
def damaged(tmp_path):
    """Create a training set with two classes of 8 images; cat/3 is truncated, dog/5 is empty."""
    make_tree(tmp_path, images=6)
    (tmp_path / "train" / "cat" / "3.png").write_bytes(encoded(photo(), "png")[:-300])
    (tmp_path / "train" / "dog" / "5.png").write_bytes(b"")
    return tmp_path


def loaders(folder, **changes):
    train, val = build_data(arguments(data_set="FOLDER", data_path=folder, batch_size=6, **changes), Distributed())
    return SimpleNamespace(train=train, val=val)


def trace(data, epochs=3):
    return [
        (int(index), int(target), image.numpy().tobytes())
        for epoch in range(epochs)
        for batch in data.train.epoch(epoch)
        for image, target, index in zip(batch.images, batch.targets, batch.indices, strict=True)
    ]


@pytest.mark.slow
def test_skipping_is_deterministic_counted_and_never_gives_a_label_of_another_image(damaged, tmp_path, capsys):
    data = loaders(damaged, skip_bad_images=True)
    expected = trace(data)
    dataset = data.train.dataset
    bad = {index for index in range(len(dataset)) if dataset.path(index).endswith(("cat/3.png", "dog/5.png"))}
    assert len(expected) == 3 * 12
    assert all(index not in bad and target == dataset.labels[index] for index, target, _ in expected)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2 and all(line.startswith(f"skipped: {damaged}/train/") for line in printed)
    assert set(data.train.skipped) == {dataset.path(index) for index in bad}
    # Bad images do not change the order of the readable ones.
    whole = trace(loaders(make_tree(tmp_path / "whole", images=6)))
    assert sum(a != b for a, b in zip(expected, whole, strict=True)) == 3 * 2


def test_a_data_set_without_any_readable_image_ends(tmp_path):
    make_tree(tmp_path, images=3)
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of 100 others tried instead could be read"):
        list(loaders(tmp_path, skip_bad_images=True).train.epoch(0))


def test_evaluation_stops_or_leaves_out_and_counts(damaged):
    bad = [damaged / "val" / name for name in ("cat/1.png", *(f"dog/{i}.png" for i in range(6)))]
    for path in bad:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="val/cat/1.png: cannot be read"):
        list(loaders(damaged).val)
    data = loaders(damaged, skip_bad_images=True)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    exact = Precision(torch.device("cpu"), torch.float32, None)
    found = evaluate(model, data.val, Distributed(), exact)
    assert (found["images"], found["skipped"]) == (5, 7)
    assert list(data.val.skipped) == [str(path) for path in bad]
    assert [index for batch in data.val for index in batch.indices.tolist()] == [0, 2, 3, 4, 5]


@pytest.mark.slow
def test_workers_leave_a_jobs_signals_to_the_main_process(tmp_path):
    before = set(multiprocessing.active_children())
    data = loaders(make_tree(tmp_path, images=12), num_workers=2)
    batches = data.train.epoch(0)
    first = next(batches)
    workers = set(multiprocessing.active_children()) - before
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
    assert len([first, *batches]) == 4
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)


def test_the_tool_finds_every_unreadable_image(damaged, tmp_path, capsys):
    report = tmp_path / "report.json"
    with pytest.raises(SystemExit) as leave:
        verify_dataset.main(["--data-path", str(damaged), "--num_workers", "0", "--json", str(report)])
    assert leave.value.code == 1
    output = capsys.readouterr()
    bad = [str(damaged / "train" / name) for name in ("cat/3.png", "dog/5.png")]
    assert [line.partition(": ")[0] for line in output.out.splitlines()] == bad
    assert output.err == "24 images, 2 of them unreadable\n"
    assert [entry["path"] for entry in json.loads(report.read_text())["unreadable"]] == bad
    verify_dataset.main(["--data-path", str(damaged), "--split", "val", "--num-workers", "0"])
    assert capsys.readouterr().out == ""
