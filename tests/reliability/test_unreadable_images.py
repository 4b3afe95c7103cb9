"""Row 13: an unreadable image is named, or skipped and counted on request; never silently replaced."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from harness import Launcher, count, one_line, outcome, traced
from PIL import Image


def encoded(image: Image.Image, format: str, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def unreadable(good: bytes) -> dict[str, bytes]:
    """File contents that are no usable image, by what is wrong."""
    picture = Image.open(io.BytesIO(good)).convert("RGB").resize((64, 64))
    jpeg = encoded(picture, "JPEG")
    return {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "text.jpg": b"not an image",
        "bomb": bomb(),
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "header only": good[:30],
        "floats": encoded(picture.convert("F"), "TIFF"),
        "zeros": bytes(500),
    }


def odd(good: bytes) -> dict[str, bytes]:
    """Unusual file contents that are whole: every one has to be read."""
    picture = Image.open(io.BytesIO(good)).convert("L")
    colours = picture.convert("RGB")
    exif = b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + bytes(20)
    return {
        "CMYK": encoded(colours.convert("CMYK"), "JPEG"),
        "palette": encoded(colours.convert("P"), "PNG"),
        "16 bits": encoded(picture.convert("I;16"), "PNG"),
        "another format's extension": encoded(colours, "BMP"),
        "corrupt EXIF": encoded(colours, "JPEG", exif=exif),
        "alpha": encoded(colours.convert("RGBA"), "PNG"),
        "one bit": encoded(picture.convert("1"), "PNG"),
    }


def spoiled(images: Path, target: Path, split: str, files: dict[str, bytes]) -> list[Path]:
    """A copy of the data set with some images of a split replaced; their paths."""
    shutil.copytree(images, target)
    paths = sorted((target / split).rglob("*.png"))[::2][: len(files)]
    for path, content in zip(paths, files.values(), strict=True):
        path.write_bytes(content)
    return paths


@pytest.mark.promise(13)
def test_an_unreadable_image_stops_training_and_evaluation_by_name(launcher: Launcher, tmp_path, images, record):
    kinds = unreadable(next(images.rglob("*.png")).read_bytes())
    cases = [(split, name) for name in list(kinds)[: count(3, len(kinds))] for split in ("train", "val")]
    failures = []
    for number, (split, name) in enumerate(cases):
        root = tmp_path / f"data{number}"
        (path,) = spoiled(images, root, split, {name: kinds[name]})
        skip = ["--skip-bad-images"] if split == "val" else []  # evaluation stops even then
        (child,) = launcher.train(
            tmp_path / f"run{number}",
            "--data-set",
            "FOLDER",
            "--data-path",
            str(root),
            "--epochs",
            "1",
            *skip,
            workers=number % 3,
        )
        code = child.wait()
        if code != 2 or not one_line(child.err) or str(path) not in child.err:
            failures.append(f"{name} in {split}: exit {code}, said {child.err[-500:]!r}")
    record(
        "unreadable images that ended training or evaluation with exit 2 and the file's name",
        len(cases),
        failures,
    )


@pytest.mark.promise(13)
def test_bad_images_are_skipped_and_counted_alike_everywhere(launcher: Launcher, tmp_path, images, record):
    kinds = unreadable(next(images.rglob("*.png")).read_bytes())
    root = tmp_path / "data"
    bad = spoiled(images, root, "train", kinds)
    flags = ["--data-set", "FOLDER", "--data-path", str(root), "--skip-bad-images", "--epochs", "1"]
    files = sorted((root / "train").rglob("*.png"))
    failures, results, used = [], [], []
    for workers in (0, 2):
        trace = tmp_path / f"{workers}.trace"
        (child,) = launcher.complete(
            tmp_path / f"run{workers}",
            *flags,
            workers=workers,
            faults=[("trace_reads", {"path": str(trace)})],
        )
        used.append([entry["indices"] for entry in traced(trace) if entry["kind"] == "batch"])
        results.append(outcome(tmp_path / f"run{workers}"))
        unnamed = [path.name for path in bad if str(path) not in child.err]
        if unnamed or f"{len(bad)} unreadable images were skipped" not in child.out + child.err:
            failures.append(f"{workers} workers: {unnamed} not named, or not counted: {child.out[-500:]}")
        trained = {str(files[index]) for batch in used[-1] for index in batch}
        failures += [f"{workers} workers: {path.name} was trained on" for path in bad if str(path) in trained]
    if used[0] != used[1] or results[0] != results[1]:
        failures.append("other samples stood in with another number of workers")
    record(
        "skipped images: named, counted, and the same samples in their place for 0 and 2 workers",
        len(bad),
        failures,
    )


@pytest.mark.promise(13)
def test_unusual_images_are_read(launcher: Launcher, tmp_path, images, record):
    kinds = odd(next(images.rglob("*.png")).read_bytes())
    root = tmp_path / "data"
    paths = spoiled(images, root, "train", kinds)
    spoiled_val = sorted((root / "val").rglob("*.png"))[0]
    spoiled_val.write_bytes(kinds["CMYK"])
    trace = tmp_path / "trace"
    launcher.complete(
        tmp_path / "run",
        "--data-set",
        "FOLDER",
        "--data-path",
        str(root),
        "--epochs",
        "1",
        faults=[("trace_reads", {"path": str(trace)})],
    )
    files = sorted((root / "train").rglob("*.png"))
    trained = {str(files[index]) for entry in traced(trace) if entry["kind"] == "batch" for index in entry["indices"]}
    failures = [f"{name}: not trained on" for name, path in zip(kinds, paths, strict=True) if str(path) not in trained]
    record(
        "unusual but whole images (CMYK, palette, 16 bits, extension, corrupt EXIF, alpha) that were read",
        len(kinds),
        failures,
    )
