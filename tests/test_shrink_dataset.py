"""A shrunk copy of a data set: same names and layout, smaller images."""

import numpy as np
import pytest
from PIL import Image

from inputs.catalogue import build_dataset
from tools import shrink_dataset
from utils import UserError


def photograph(size, mode="RGB") -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).convert(mode)


@pytest.fixture
def source(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
    folder = tmp_path / "images" / "train" / "cat"
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph((120, 80)).save(folder / "wide.JPEG", quality=95, exif=exif)
    photograph((80, 120)).save(folder / "high.jpg", "png")  # the content decides
    photograph((100, 90), "CMYK").save(folder / "print.jpeg")
    photograph((100, 100), "P").save(folder / "palette.png")
    photograph((30, 500)).save(folder / "small.jpg")
    Image.fromarray(np.linspace(0, 65535, 6400).reshape(80, 80).astype(np.uint16)).save(folder / "deep.png")
    (folder / "broken.jpg").write_bytes((folder / "wide.JPEG").read_bytes()[:900])
    (folder / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "images" / "labels.csv").write_text("file,label\n")
    photograph((60, 90)).save(tmp_path / "images" / "val" / "cat" / "0.png")
    return tmp_path / "images"


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("."))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_copy_has_the_same_files_with_smaller_images(source, tmp_path, capsys, workers):
    target = tmp_path / "copy"
    shrink_dataset.main([str(source), str(target), "--short-side", "40", "--num-workers", str(workers)])
    assert names(target) == names(source)
    output = capsys.readouterr().err
    assert "broken.jpg: copied unchanged: " in output and f"9 files are in {target}, 9 of them new\n" in output
    for name in ("train/cat/broken.jpg", "train/cat/small.jpg", "labels.csv"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    sizes = {}
    for path in (target / "train" / "cat").glob("[!b]*"):
        with Image.open(path) as copy, Image.open(source / "train" / "cat" / path.name) as original:
            sizes[path.stem] = copy.size
            assert (copy.format, copy.getexif()) == (original.format, original.getexif())
            if path.stem not in ("deep", "palette"):
                expected = np.asarray(original.convert("RGB").resize(copy.size, Image.Resampling.BICUBIC), dtype=int)
                assert np.abs(np.asarray(copy.convert("RGB")) - expected).mean() < 4
    assert sizes == {
        "wide": (60, 40),
        "high": (40, 60),
        "print": (44, 40),
        "palette": (40, 40),
        "small": (30, 500),
        "deep": (40, 40),
    }
    with Image.open(target / "train" / "cat" / "deep.png") as deep:
        assert deep.mode == "I;16" and len(np.unique(np.asarray(deep))) > 1000
    assert len(build_dataset("FOLDER", target, "val")) == 1


def test_a_second_call_goes_on_and_impossible_folders_are_refused(source, tmp_path):
    target = tmp_path / "copy"
    command = [str(source), str(target), "--short-side", "40", "--num-workers", "0"]
    shrink_dataset.main(command)
    whole = {name: (target / name).read_bytes() for name in names(target) if (target / name).is_file()}
    (target / "train" / "cat" / "wide.JPEG").unlink()
    (target / "labels.csv").write_text("left alone")
    shrink_dataset.main(command)
    assert (target / "labels.csv").read_text() == "left alone"
    assert (target / "train" / "cat" / "wide.JPEG").read_bytes() == whole["train/cat/wide.JPEG"]
    with pytest.raises(UserError, match="the copy cannot be inside"):
        shrink_dataset.main([str(source), str(source / "small")])
    with pytest.raises(UserError, match="no such"):
        shrink_dataset.main([str(tmp_path / "gone"), str(target)])
    with pytest.raises(UserError, match="a file is in its place"):
        shrink_dataset.main([str(source), str(target / "labels.csv")])
