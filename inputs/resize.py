"""Resizing by the shorter side in bounded memory, for images of any shape.

Resized to 256, an image of 20000×1 pixels has 1.3 billion, of which evaluation's crop keeps 256×256. Pillow enlarges
each row by itself, then each column: so where the resized image would be that large, it is made a few lines at a
time and of each only the part in the crop is kept. The pixels are the same.
"""

from __future__ import annotations

from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from utils import UserError

MAX_PIXELS = 2**25  # that are made at a time: 128 MiB
MAX_LINE = 2**23  # pixels; Pillow keeps 40 bytes of coefficients for each


class Elongated(UserError):
    """An image that is too long for its width, or too wide for its height, to be resized."""

    def __init__(self, image: Image.Image, height: int, width: int):
        super().__init__(f"{image.width}x{image.height} pixels are too elongated to be resized to {width}x{height}")


class ResizedCentre:
    """timm's first two steps of evaluation as one: a resize by the shorter side, and a crop of the centre."""

    def __init__(self, resize_shorter: transforms.Resize | ResizeKeepRatio, crop: transforms.CenterCrop):
        self._resize = resize_shorter
        self._crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        """The crop of the resized image; raises `Elongated` where even one line of it is too large."""
        height, width = _resized_size(self._resize, image)
        if not _is_large(image, height, width):
            return self._crop(self._resize(image))
        if max(height, width) > MAX_LINE:
            raise Elongated(image, height, width)
        crop_height, crop_width = self._crop.size
        # As torchvision's centre crop rounds; the resized image is nowhere smaller than the crop.
        top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
        columns = _enlarge_rows(image, width, left, left + crop_width, self._resize.interpolation)
        columns = columns.transpose(Image.Transpose.TRANSPOSE)
        rows = _enlarge_rows(columns, height, top, top + crop_height, self._resize.interpolation)
        return rows.transpose(Image.Transpose.TRANSPOSE)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._resize}, {self._crop})"


class BoundedResize(transforms.Resize):
    """torchvision's resize by the shorter side; raises `Elongated` where the whole result is too large."""

    def forward(self, image: Image.Image) -> Image.Image:
        height, width = _resized_size(self, image)
        if _is_large(image, height, width):
            raise Elongated(image, height, width)
        return super().forward(image)


def _resized_size(resize_shorter: transforms.Resize | ResizeKeepRatio, image: Image.Image) -> tuple[int, int]:
    """(height, width) after a resize by the shorter side."""
    if isinstance(resize_shorter, ResizeKeepRatio):
        height, width = resize_shorter.get_params(image, resize_shorter.size, resize_shorter.longest)
        return height, width
    shorter, longer = resize_shorter.size, int(resize_shorter.size * max(image.size) / min(image.size))
    return (shorter, longer) if image.height <= image.width else (longer, shorter)


def _is_large(image: Image.Image, height: int, width: int) -> bool:
    """Whether the resized image would be. One that only gets smaller takes no more memory than is taken already."""
    return height * width > max(MAX_PIXELS, image.height * image.width)


def _enlarge_rows(image: Image.Image, width: int, first: int, last: int, method: InterpolationMode) -> Image.Image:
    """Columns `first` to `last` of the image with its rows resized to `width`."""
    kept = Image.new(image.mode, (last - first, image.height))
    lines = MAX_PIXELS // width
    for top in range(0, image.height, lines):
        strip = image.crop((0, top, image.width, min(top + lines, image.height)))
        strip = resize(strip, [strip.height, width], method)
        kept.paste(strip.crop((first, 0, last, strip.height)), (0, top))
    return kept
