"""Position embeddings of another image size: the grid of patches is interpolated, the other tokens' stay."""

import math

import numpy as np

from tljax.errors import UserError, unknown

Grid = tuple[int, int]


def resize(
    position: np.ndarray,
    length: int,
    prefix: int = 0,
    method: str = "bicubic",
    old: Grid | None = None,
    new: Grid | None = None,
) -> np.ndarray:
    """Position embeddings [tokens, width] of a grid of patches for one of another size, [length, width], in float32.

    The first `prefix` rows (class token, registers) are copied. `method`: a key of METHODS; the default is what timm's
    `resample_abs_pos_embed` does. `old` and `new` are the grids, rows and columns; by default squares. Raises
    UserError where the numbers of patches are no such grids, and for an unknown method.
    """
    grids = []
    for rows, grid in ((len(position), old), (length, new)):
        patches = rows - prefix
        side = math.isqrt(max(patches, 0))
        if grid and grid[0] * grid[1] != patches:
            raise UserError(f"position embeddings of {patches} patches are no grid of {grid[0]}x{grid[1]}")
        if not grid and (not side or side**2 != patches):
            raise UserError(
                f"position embeddings of {patches} patches are no square grid and cannot be resized: name the grid, as "
                "resize='embed/position:bicubic:14x28'"
            )
        grids.append(grid or (side, side))
    (height, width), (rows, columns) = grids
    down, across = line(method, height, rows), line(method, width, columns)
    grid = np.asarray(position[prefix:], np.float64).reshape(height, width, -1)
    grid = np.einsum("io,jp,opw->ijw", down, across, grid, optimize=True).reshape(rows * columns, -1)
    return np.concatenate([np.asarray(position[:prefix], np.float32), grid.astype(np.float32)])


def resize_patch(kernel: np.ndarray, height: int, width: int, method: str = "bicubic") -> np.ndarray:
    """The kernel [h, w, in, out] that embeds patches, for patches of another size, in float32.

    It gives for resized patches what it gave for the patches, as nearly as can be: the pseudo-inverse of FlexiViT
    (Beyer et al. 2023), as timm's `resample_patch_embed`. Raises UserError for an unknown method.
    """
    down, across = (
        np.linalg.pinv(line(method, *sizes).T) for sizes in ((len(kernel), height), (kernel.shape[1], width))
    )
    return np.einsum("ia,jb,abco->ijco", down, across, kernel.astype(np.float64), optimize=True).astype(np.float32)


def line(method: str, old: int, new: int) -> np.ndarray:
    """The matrix [new, old] that resamples a line of pixels. Raises UserError for an unknown method."""
    if method not in METHODS:
        raise unknown("method of resizing", method, METHODS)
    return METHODS[method](old, new)


def bicubic(old: int, new: int) -> np.ndarray:
    """Keys (1981) with a = -1/2, widened to shrink, as Pillow's and PyTorch's with anti-aliasing."""
    scale = old / new
    distance = np.abs((np.arange(new)[:, None] + 0.5) * scale - (np.arange(old) + 0.5)) / max(scale, 1.0)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def bilinear(old: int, new: int) -> np.ndarray:
    """Between the centres of pixels, without anti-aliasing: what timm does with Google's files."""
    return _linear(((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1), old)


def zoom(old: int, new: int) -> np.ndarray:
    """Linear from corner to corner: `scipy.ndimage.zoom` of order 1, as vision_transformer and big_vision have it."""
    return _linear(np.arange(new) * ((old - 1) / max(new - 1, 1)), old)


def _linear(at: np.ndarray, old: int) -> np.ndarray:
    return np.maximum(1 - np.abs(at[:, None] - np.arange(old)), 0.0)


METHODS = {"bicubic": bicubic, "bilinear": bilinear, "zoom": zoom}
