from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP, AugmentOp, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.nn.functional import max_pool2d, pad
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.ops import roi_align

from inputs.images import file_dataset
from inputs.label_maps import MAP_SHAPE, check_label_maps, encode_label_map, read_label_map
from inputs.token_labels import GEOMETRIC_OPS, TokenLabelTransform, dense_targets, region_logits
from training.classification import build_criterion
from utils import UserError, seeded

GOLDEN = np.load(Path(__file__).parent / "golden" / "token_labels.npz")
GOLDEN_CLASSES = 24
SIDE = 112  # of augmented images, in pixels: 7 tokens of 16
TOKENS = (7, 7)


def golden_record() -> dict[str, torch.Tensor]:
    sources = {"values": "value", "indices": "index", "crop": "crop_yxhw", "label": "ground_truth"}
    record = {name: torch.from_numpy(GOLDEN[source]) for name, source in sources.items()}
    return record | {"affines": torch.eye(2, 3).expand(len(record["label"]), 1, 2, 3)}


def small_map(classes: int = 10, seed: int = 0) -> torch.Tensor:
    return encode_label_map(torch.randn(classes, 18, 18, generator=torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------------------------------------- dense targets


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_dense_targets_equal_the_golden_ones_also_under_autocast(size, swapped, autocast):
    expected = GOLDEN[f"target_{'swapped_' if swapped else ''}{size}"]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = dense_targets(golden_record(), GOLDEN_CLASSES, (size, size), 0.1, swapped)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (12, 12), (5, 9), (24, 24)])
def test_without_geometric_augmentation_regions_are_torchvisions_roi_align(size):
    generator = torch.Generator().manual_seed(1)
    extent = torch.rand(40, 2, generator=generator) * 0.75 + 0.25
    corner = torch.rand(40, 2, generator=generator) * (1 - extent)
    values = 5 * torch.randn(40, 5, 18, 18, generator=generator)
    indices = torch.rand(40, 30, 18, 18, generator=generator).topk(5, dim=1).indices
    record = {
        "values": values,
        "indices": indices.int(),
        "crop": torch.cat([corner, extent], 1),
        "affines": torch.eye(2, 3).expand(40, 1, 2, 3),
    }

    boxes = torch.cat([corner.flip(1), (corner + extent).flip(1)], 1) * 18 - 0.5
    boxes = torch.cat([torch.arange(40.0)[:, None], boxes], 1)
    dense = torch.zeros(40, 30, 18, 18).scatter_(1, indices, values)
    expected = roi_align(dense, boxes, size, aligned=False).flatten(2)
    torch.testing.assert_close(region_logits(record, 30, [size]), expected, atol=1e-4, rtol=0)


def test_regions_without_any_image_get_the_uniform_distribution():
    record = golden_record()
    record["affines"] = torch.tensor([[1.0, 0, 1.5], [0, 1, 0]]).expand(4, 1, 2, 3)
    targets = dense_targets(record, GOLDEN_CLASSES, (7, 7), smoothing=0)
    torch.testing.assert_close(targets[..., 1:], torch.full_like(targets[..., 1:], 1 / GOLDEN_CLASSES))


# ----------------------------------------------------------------------------------------------- augmentation


def painted(width: int, height: int, negative: bool = False) -> tuple[Image.Image, torch.Tensor]:
    """An image whose red is x, green is y (as fractions) and blue is full, and a label map whose logits of classes
    0, 1 and 2 are the same. negative: red is 1 - x and green is 1 - y in the image."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    if negative:
        x, y = 1 - x, 1 - y
    image = np.stack([x * 255, y * 255, np.full_like(x, 255)], axis=-1).round().astype(np.uint8)
    cells = (torch.arange(18) + 0.5) / 18
    logits = torch.zeros(5, 18, 18)
    logits[0], logits[1], logits[2] = cells, cells[:, None], 1
    return Image.fromarray(image), torch.stack([logits, torch.arange(5.0)[:, None, None].expand(5, 18, 18)])


def augmentation(*middle, crop=True, flips=0.0) -> transforms.Compose:
    """A training transform to pixels, black where there is no image."""
    first = (
        RandomResizedCropAndInterpolation(SIDE, scale=(0.4, 1.0), interpolation="bicubic")
        if crop
        else RandomResizedCropAndInterpolation(SIDE, scale=(1.0, 1.0), ratio=(1.0, 1.0), interpolation="bicubic")
    )
    flip = [transforms.RandomHorizontalFlip(flips), transforms.RandomVerticalFlip(flips)]
    return transforms.Compose([first, *flip, *middle, transforms.PILToTensor()])


def operation(name: str, magnitude: float) -> AugmentOp:
    black = {"translate_const": 50, "img_mean": (0, 0, 0)}
    return AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=black)


def assert_aligned(transform: transforms.Compose, seed: int, size: tuple[int, int] = (200, 150)) -> None:
    """Check that an image and its map have the same values at every token after the same augmentation."""
    traced = TokenLabelTransform(transform)
    with seeded("aligned", seed):
        image, record = traced(*painted(*size), label=3)
    with seeded("aligned", seed):
        negative, _ = traced(*painted(*size, negative=True), label=3)
    colours, negative = image.float() / 255, negative.float() / 255
    colours[:2] = (colours[:2] + colours[2:] - negative[:2]) / 2  # cancels Pillow's rounding down
    found = region_logits(default_collate([record]), 5, [TOKENS]).view(5, *TOKENS)
    blocks = colours.unflatten(1, (7, 16)).unflatten(3, (7, 16)).mean((2, 4))
    whole = blocks[2] > 0.9999
    # 0.012: within half a map cell of the image's edge the map is flat; a token is 0.14 wide.
    assert torch.allclose(blocks[:2, whole], found[:2, whole], atol=0.012, rtol=0)
    assert (found[2, whole] > 0.999).all()
    assert (blocks[2] - found[2]).abs().max() < 0.35  # a token that is partly outside has only 9 samples
    assert (found[:3, blocks[2] < 0.0001] == 0).all()
    assert_pixels_come_from_where_the_record_says(colours, record)


def assert_pixels_come_from_where_the_record_says(colours: torch.Tensor, record: dict) -> None:
    inside = -max_pool2d(-pad(colours[2:], [4] * 4), 9, stride=1)[0] > 0.9999  # with its neighbourhood
    if inside.sum() < 100:
        return
    row, column = torch.nonzero(inside, as_tuple=True)
    places = (torch.stack([column, row]) + 0.5) / SIDE
    to_crop = record["affines"][0]
    in_crop = to_crop[:, :2] @ places + to_crop[:, 2:]
    y, x, height, width = record["crop"]
    source = torch.stack([x, y])[:, None] + in_crop * torch.stack([width, height])[:, None]
    difference = colours[:2, row, column] - source
    assert difference.abs().max() < 0.01
    assert difference.mean(1).abs().max() < 0.0021  # half a level of 8 bits; half a pixel is 0.0045


@pytest.mark.parametrize("magnitude", [0, 9])
@pytest.mark.parametrize("name", sorted(GEOMETRIC_OPS))
def test_the_map_stays_aligned_under_every_geometric_operation(name, magnitude):
    for seed in range(4):  # both directions, both interpolations
        assert_aligned(augmentation(RandAugment([operation(name, magnitude)], 1), crop=seed > 1), seed)


def test_the_map_stays_aligned_under_crops_and_flips():
    for seed in range(12):
        assert_aligned(augmentation(flips=0.5), seed, size=[(200, 150), (120, 260)][seed % 2])


@pytest.mark.slow
def test_the_map_stays_aligned_under_compositions():
    ops = [operation(name, 6) for name in GEOMETRIC_OPS]
    for seed in range(12):
        assert_aligned(augmentation(RandAugment(ops, 3), flips=0.5), seed)


def test_the_map_stays_aligned_under_a_padded_crop():
    crop = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.RandomCrop(SIDE, padding=28)])
    for seed in range(6):
        assert_aligned(transforms.Compose([crop, transforms.PILToTensor()]), seed)


@pytest.mark.parametrize("name", sorted(set(NAME_TO_OP) - set(GEOMETRIC_OPS)))
def test_timms_other_operations_move_nothing(name):
    """An operation that moved pixels would not commute with flips."""
    image = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 80).rotate(30).convert("RGB")
    with seeded(name):
        expected = np.asarray(operation(name, 8)(image), dtype=int)
    for turn in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
        with seeded(name):
            changed = operation(name, 8)(image.transpose(turn)).transpose(turn)
        assert np.abs(np.asarray(changed, dtype=int) - expected).max() <= 2


@pytest.mark.parametrize(
    "options",
    [
        {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "random"},
        {"auto_augment": "rand-m15-n4-mmax20-tweights", "interpolation": "bicubic", "vflip": 0.5},
        {"auto_augment": "original-mstd0.5", "interpolation": "bilinear"},
        {"auto_augment": None, "color_jitter": 0.4, "interpolation": "bicubic"},
    ],
    ids=["recipe", "weighted", "autoaugment", "jitter"],
)
def test_images_are_those_of_timms_transform(options):
    transform = create_transform(64, is_training=True, normalize=False, **options)
    traced = TokenLabelTransform(transform)
    photo, label_map = painted(90, 120)
    moved = 0
    for seed in range(20):
        with seeded(seed):
            expected = transform(photo)
        with seeded(seed):
            image, record = traced(photo, label_map, 1)
        assert torch.equal(image, expected)
        moved += not torch.equal(record["affines"][0], torch.eye(2, 3))
    assert moved >= 5


def test_transforms_whose_geometry_is_unknown_are_refused():
    for options in ({"auto_augment": "augmix-m5"}, {"no_aug": True}):
        with pytest.raises(UserError, match="do not use --no-aug or --aa augmix"):
            TokenLabelTransform(create_transform(64, is_training=True, **options))


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("classes, dtype", [(3, torch.float16), (2048, torch.float16), (3000, torch.float32)])
def test_class_indices_are_exact_for_any_number_of_classes(tmp_path, classes, dtype):
    logits = torch.randn(classes, 18, 18, generator=torch.Generator().manual_seed(0))
    logits[-1] += 50  # the largest index has to be among the five
    torch.save(encode_label_map(logits), tmp_path / "1.pt")
    found = read_label_map(tmp_path / "1.pt", classes)
    assert found.dtype == dtype and found.shape == MAP_SHAPE
    order = logits.argsort(0, descending=True)[: min(classes, 5)]
    assert torch.equal(found[1, : len(order)].long(), order)
    torch.testing.assert_close(found[0, : len(order)].float(), logits.gather(0, order), atol=1e-3, rtol=1e-3)


def with_index(value: float) -> torch.Tensor:
    label_map = small_map().float()
    label_map[1, 0, 0, 0] = value
    return label_map


@pytest.mark.parametrize(
    "content, reason",
    [
        (torch.zeros(2, 5, 14, 14), "expected finite numbers of shape"),
        ({"map": torch.zeros(MAP_SHAPE)}, "expected finite"),
        (small_map() * float("nan"), "expected finite"),
        (with_index(-1), "of 10 classes"),
        (with_index(0.5), "of 10 classes"),
        (with_index(10), "of 10 classes: its indices are not all below that"),
        (Path("x"), "damaged"),
    ],
)
def test_what_is_not_a_label_map_is_named(tmp_path, content, reason):
    torch.save(content, tmp_path / "1.pt")
    with pytest.raises(UserError, match=reason) as error:
        read_label_map(tmp_path / "1.pt", num_classes=10)
    assert str(tmp_path / "1.pt") in str(error.value) and "\n" not in str(error.value)


def test_damaged_bytes_are_noticed(tmp_path):
    path = tmp_path / "1.pt"
    torch.save(small_map(), path)
    whole = path.read_bytes()
    start = whole.index(small_map().numpy().tobytes())
    flipped = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(start, start + 6480, 400)]
    for content in [b"", b"not a map", *(whole[:size] for size in range(1, len(whole), 700)), *flipped]:
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            read_label_map(path, num_classes=10)


def test_missing_and_unfitting_maps_are_named_before_training(tmp_path):
    (tmp_path / "a").mkdir()
    for index in range(30):
        torch.save(small_map(), tmp_path / "a" / f"{index}.pt")

    def check(images: int, root=tmp_path, classes=10) -> None:
        paths, labels = [f"/data/a/{i}.JPEG" for i in range(images)], [0] * images
        check_label_maps(file_dataset(paths, labels, "0123456789"[:classes]), root)

    check(30)
    with pytest.raises(UserError, match="of 9 classes: its indices"):
        check(30, classes=9)
    with pytest.raises(UserError, match=f"2 of 32 label .*{tmp_path}/a/30.pt;"):
        check(32)
    with pytest.raises(UserError, match="30 of 30 label maps are missing"):
        check(30, tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------ model


def test_a_label_size_that_contradicts_the_models_is_refused():
    run = SimpleNamespace(args=SimpleNamespace(token_label=True, token_label_size=14, token_label_crop="right"))
    with pytest.raises(UserError, match=r"--token-label-size 14: .* \(7, 7\)"):
        build_criterion(run, SimpleNamespace(token_label_size=(7, 7)), SimpleNamespace(class_names=range(10)))
