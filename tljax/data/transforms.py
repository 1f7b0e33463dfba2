"""Crops, resizing and flips: RGB uint8 arrays [height, width, 3] in and out."""

import math

import numpy as np

from tljax.data.images import decode, opencv
from tljax.errors import unknown

INTERPOLATIONS = ("bicubic", "bilinear")


def check_interpolation(name: str) -> str:
    """Returns the name; raises UserError for one that does not exist."""
    if name not in INTERPOLATIONS:
        raise unknown("interpolation", name, INTERPOLATIONS)
    return name


def random_box(
    rng: np.random.Generator, height: int, width: int, min_scale: float, ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random-resized crop (Szegedy et al. 2015; the sampling of torchvision).

    The area is uniform in [min_scale, 1] of the image's, the aspect ratio log-uniform in `ratio`. Where ten
    draws do not fit, the largest centred part with an admissible aspect ratio.
    """
    for _ in range(10):
        area = height * width * rng.uniform(min_scale, 1.0)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    rng: np.random.Generator,
    image,
    size: int,
    min_scale: float,
    ratio: tuple[float, float],
    interpolation: str,
) -> np.ndarray:
    """A random part of the image (bytes or array), resized to uint8 [size, size, 3]. Raises BadImage."""
    part = decode(image, size, lambda height, width: random_box(rng, height, width, min_scale, ratio))
    cv2 = opencv()
    shrink = math.sqrt(part.shape[0] * part.shape[1]) / size
    # Cubic and linear read 16 and 4 pixels whatever the scale; the mean over the area keeps aliasing out.
    method = cv2.INTER_CUBIC if interpolation == "bicubic" else cv2.INTER_LINEAR
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if shrink >= 1.5 else method)


def resize_and_centre_crop(image, size: int, crop: float, interpolation: str) -> np.ndarray:
    """Resizes the shorter side to round(size / crop), antialiased, and cuts the centre: [size, size, 3].

    Equal to torchvision's Resize and CenterCrop on PIL images, bit for bit. Raises BadImage.
    """
    from PIL import Image

    pixels = Image.fromarray(decode(image))
    short = max(size, round(size / crop))
    width, height = pixels.size
    if width <= height:
        new = (short, int(short * height / width))
    else:
        new = (int(short * width / height), short)
    method = Image.Resampling.BICUBIC if interpolation == "bicubic" else Image.Resampling.BILINEAR
    if new != pixels.size:
        pixels = pixels.resize(new, method)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.asarray(pixels.crop((left, top, left + size, top + size)))


def flip(image: np.ndarray) -> np.ndarray:
    """Left and right exchanged."""
    return opencv().flip(image, 1)  # many times faster than a copy of the reversed view
