"""Position embeddings of another image size: the grid of patches is interpolated, the other tokens' stay."""

import math

import numpy as np

from tljax.errors import UserError


def resize(position: np.ndarray, length: int, prefix: int = 0) -> np.ndarray:
    """Position embeddings [old, width] of a square grid for one of another size, [length, width], in float32.

    The first `prefix` rows (class token, registers) are copied. Bicubic with anti-aliasing, as timm's
    `resample_abs_pos_embed`. Raises UserError where either number of patches is no square.
    """
    sides = [math.isqrt(max(rows - prefix, 0)) for rows in (len(position), length)]
    for side, rows in zip(sides, (len(position), length)):
        if not side or side**2 != rows - prefix:
            raise UserError(f"position embeddings of {rows - prefix} patches are no square grid and cannot be resized")
    old, new = sides
    weights = bicubic(old, new)
    grid = np.asarray(position[prefix:], np.float64).reshape(old, old, -1)
    grid = np.einsum("io,jp,opw->ijw", weights, weights, grid, optimize=True).reshape(new**2, -1)
    return np.concatenate([np.asarray(position[:prefix], np.float32), grid.astype(np.float32)])


def bicubic(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that resamples a line of pixels: Keys (1981) with a = -1/2, widened to shrink."""
    scale = old / new
    distance = np.abs((np.arange(new)[:, None] + 0.5) * scale - (np.arange(old) + 0.5)) / max(scale, 1.0)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)
