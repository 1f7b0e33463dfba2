"""Colour jitter and RandAugment; PIL does the work on the pixels. RGB uint8 [height, width, 3] in and out."""

import numpy as np

FILL = (128, 128, 128)
LEVELS = 10  # magnitudes run from 0 to 10, as in the paper


def color_jitter(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation in random order, each times a factor uniform in 1 ± strength."""
    from PIL import Image, ImageEnhance

    pixels = Image.fromarray(image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in rng.permutation(3):
        pixels = enhancers[which](pixels).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return np.asarray(pixels)


def randaugment(rng: np.random.Generator, image: np.ndarray, count: int, magnitude: float) -> np.ndarray:
    """RandAugment (Cubuk et al. 2020): `count` operations, drawn with replacement, at `magnitude` of 10."""
    from PIL import Image

    pixels = Image.fromarray(image)
    for which in rng.integers(len(OPERATIONS), size=count):
        sign = 1 if rng.random() < 0.5 else -1
        pixels = OPERATIONS[which](pixels, magnitude / LEVELS, sign)
    return np.asarray(pixels)


def _affine(image, matrix):
    from PIL import Image

    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def _enhance(kind: str):
    def apply(image, level, sign):
        from PIL import ImageEnhance

        return getattr(ImageEnhance, kind)(image).enhance(1 + sign * 0.9 * level)

    return apply


def _identity(image, level, sign):
    return image


def _autocontrast(image, level, sign):
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image, level, sign):
    from PIL import ImageOps

    return ImageOps.equalize(image)


def _posterize(image, level, sign):
    from PIL import ImageOps

    return ImageOps.posterize(image, 8 - round(4 * level))


def _solarize(image, level, sign):
    from PIL import ImageOps

    return ImageOps.solarize(image, 256 - round(256 * level))


def _rotate(image, level, sign):
    from PIL import Image

    return image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=FILL)


def _shear_x(image, level, sign):
    return _affine(image, (1, sign * 0.3 * level, 0, 0, 1, 0))


def _shear_y(image, level, sign):
    return _affine(image, (1, 0, 0, sign * 0.3 * level, 1, 0))


# 150 of 331 pixels in the paper's search space, as a part of the side.
def _translate_x(image, level, sign):
    return _affine(image, (1, 0, sign * 150 / 331 * level * image.width, 0, 1, 0))


def _translate_y(image, level, sign):
    return _affine(image, (1, 0, 0, 0, 1, sign * 150 / 331 * level * image.height))


# The paper's fourteen. Each takes (PIL image, level in 0..1, sign) and returns an image of the same size.
OPERATIONS = (
    _identity,
    _autocontrast,
    _equalize,
    _rotate,
    _solarize,
    _enhance("Color"),
    _posterize,
    _enhance("Contrast"),
    _enhance("Brightness"),
    _enhance("Sharpness"),
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
