"""What becomes of an array between a file and a leaf: the transforms that conversion tables name, with their inverses.

A transform may have a number behind a colon, as "heads:3". What a reshape forgets, the inverse takes from the number
or from the one form that files have: "squeezed" arrays have three axes there.
"""

import itertools
import math

import numpy as np

Shape = tuple[int, ...]

# Which axes of the file's array become the axes of ours; None leaves them.
AXES: dict[str, tuple[int, ...] | None] = {
    "same": None,
    "conv": (2, 3, 1, 0),  # [out, in, height, width] -> [height, width, in, out], depthwise included
    "linear": (1, 0),  # [out, in] -> [in, out]
    "depthwise": (0, 1, 3, 2),  # [height, width, channels, 1] -> [height, width, 1, channels], as Keras has it
}
SQUEEZED = "squeezed"  # without the leading axes of length one: [1, 1, width] -> [width]
PIXEL = "pixel"  # a convolution of one pixel as a linear map: [1, 1, in, out] -> [in, out]
FLAT = "flat"  # a convolution as wide as the image as a linear map: [out, in, n, n] -> [in * n * n, out]; n: the number
VECTOR = "vector"  # all axes as one: [channels, 1, 1] -> [channels]
BGR = "bgr"  # a first convolution, [height, width, in, out], for images with their channels in the other order
# Of n (the number) flattened pixels a linear map: [n * channels, out] -> [channels * n, out].
ROWS_FIRST = "rows_first"
# So many heads as an axis of their own, in a bias, behind the inputs, before the outputs.
HEADS = "heads"  # [heads, d] -> [heads * d]
INTO_HEADS = "into_heads"  # [in, heads, d] -> [in, heads * d]
FROM_HEADS = "from_heads"  # [heads, d, out] -> [heads * d, out]
_HEADS_AT = {HEADS: (0, 2), INTO_HEADS: (1, 3), FROM_HEADS: (0, 3)}  # which axis has the heads, of how many


def apply(how: str, array: np.ndarray) -> np.ndarray:
    """The file's array as our leaf has it. Raises ValueError for a shape that `shape` gives as None."""
    name, number = _parsed(how)
    if name == FLAT:
        return array.reshape(len(array), -1).T
    if name == BGR:
        return array[:, :, ::-1]
    if name == ROWS_FIRST:
        return array.reshape(number, -1, array.shape[-1]).swapaxes(0, 1).reshape(array.shape)
    if name in AXES:
        axes = AXES[name]
        return array if axes is None else np.transpose(array, axes)
    return array.reshape(shape(how, array.shape))


def shape(how: str, found: Shape) -> Shape | None:
    """The shape that `apply` gives an array of shape `found`; None where it cannot be."""
    name, number = _parsed(how)
    if name == SQUEEZED:
        return tuple(itertools.dropwhile(lambda length: length == 1, found))
    if name == PIXEL:
        return found[2:] if len(found) == 4 and found[:2] == (1, 1) else None
    if name == FLAT:
        return (math.prod(found[1:]), found[0]) if len(found) == 4 else None
    if name == VECTOR:
        return (math.prod(found),)
    if name == BGR:
        return found if len(found) == 4 else None
    if name == ROWS_FIRST:
        return found if len(found) == 2 and found[0] % number == 0 else None
    if name in _HEADS_AT:
        axis, count = _HEADS_AT[name]
        if len(found) != count or found[axis] != number:
            return None
        return (*found[:axis], found[axis] * found[axis + 1], *found[axis + 2 :])
    axes = AXES[name]
    if axes is None:
        return found
    return tuple(found[axis] for axis in axes) if len(axes) == len(found) else None


def undo(how: str, array: np.ndarray) -> np.ndarray:
    """Our leaf as the file has it: the inverse of `apply`."""
    name, number = _parsed(how)
    if name == SQUEEZED:
        return array.reshape((1,) * (3 - array.ndim) + array.shape)
    if name == PIXEL:
        return array[None, None]
    if name == FLAT:
        return array.T.reshape(array.shape[1], -1, number, number)
    if name == VECTOR:
        return array.reshape(-1, 1, 1)
    if name == BGR:
        return array[:, :, ::-1]
    if name == ROWS_FIRST:
        return array.reshape(-1, number, array.shape[-1]).swapaxes(0, 1).reshape(array.shape)
    if name in _HEADS_AT:
        axis, _ = _HEADS_AT[name]
        return array.reshape(*array.shape[:axis], number, -1, *array.shape[axis + 1 :])
    axes = AXES[name]
    return array if axes is None else np.transpose(array, np.argsort(axes))


def _parsed(how: str) -> tuple[str, int]:
    name, _, number = how.partition(":")
    return name, int(number or 1)
