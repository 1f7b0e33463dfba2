"""Which leaves a file may have in another shape, and what is then made of them: positions, patches, image channels.

`config.resize` names them: a path or pattern, and behind a colon the method, as "embed/position:zoom"; for grids of
patches that are not square those of the file and of the network, as "embed/position:bicubic:14x28-16x32".
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tljax import errors
from tljax.errors import UserError
from tljax.patterns import matches
from tljax.weights import matcher, positions

_GRIDS = re.compile(r"(\d+)x(\d+)(?:-(\d+)x(\d+))?")


class Way(NamedTuple):
    """The axes in which a leaf may differ, and the function (array, shape wanted) → array."""

    axes: tuple[int, ...]
    make: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def path(spec: str) -> str:
    """The path or pattern in an entry of `config.resize`."""
    return spec.partition(":")[0]


def resizable(model_name: str) -> dict[str, tuple[int, ...]]:
    """{leaf of the model: axes in which a file may differ}, of those that config.resize can name."""
    from tljax import models

    found = {f"params/{at}": (0,) for at in models.positions(model_name)}
    return found | {f"params/{at}": (0, 1) for at in models.patches(model_name)}


def check(resize: Sequence[str], model_name: str) -> None:
    """Raises UserError for an entry that names no such leaf, or a method or grid that does not exist."""
    known = [matcher.path_of(leaf) for leaf in resizable(model_name)] if resize else []
    for spec in resize:
        pattern, method, _ = _parsed(spec)
        if method not in positions.METHODS:
            raise errors.unknown("method of resizing", method, positions.METHODS)
        if not known:
            raise UserError(f"resize={pattern}: no leaf of {model_name} has a way to be resized")
        if not any(matches(pattern, at) for at in known):
            raise UserError(f"resize={pattern}: of {model_name} only {errors.listing(known)} has a way to be resized")


def of_patches(resize: Sequence[str], model_name: str) -> bool:
    """Whether patches are resized, so that weights of another model may be meant."""
    from tljax import models

    return any(matches(path(spec), at) for spec in resize for at in models.patches(model_name))


def ways(model_name: str, resize: Sequence[str], channels: int | None = None) -> dict[str, Way]:
    """{leaf: what may be done to it}. `channels`: of the network's images, where another number of the file's is meant.

    Raises UserError.
    """
    from tljax import models

    found: dict[str, Way] = {}
    prefixes = {f"params/{at}": prefix for at, prefix in models.positions(model_name).items()}
    for leaf in resizable(model_name):
        spec = next((spec for spec in resize if matches(path(spec), matcher.path_of(leaf))), None)
        if spec is not None:
            _, method, grids = _parsed(spec)
            if leaf in prefixes:
                found[leaf] = Way((0,), _of_positions(prefixes[leaf], method, *grids))
            else:
                found[leaf] = Way((0, 1), _of_patch(method))
    if channels is not None:
        leaf = models.stem(model_name)
        before = found.get(leaf)
        found[leaf] = Way((*(before.axes if before else ()), 2), _of_channels(before))
    return found


def adapted(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The first kernel [h, w, 3, out] for images of so many channels, as timm's `adapt_input_conv`.

    One: the sum over the three; others: the three again and again, weaker by 3 / channels.
    """
    if channels == 1:
        return kernel.astype(np.float32).sum(2, keepdims=True)
    times = -(-channels // kernel.shape[2])
    repeated = np.tile(kernel.astype(np.float32), (1, 1, times, 1))[:, :, :channels]
    return repeated * np.float32(kernel.shape[2] / channels)


def told(leaf: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What was done to an adapted leaf: "stem/conv/kernel: 3 → 1 channels by sum"."""
    how = "sum" if expected[2] == 1 else f"repetition, times {found[2]}/{expected[2]}"
    return f"{matcher.path_of(leaf)}: {found[2]} → {expected[2]} channels by {how}"


def _of_positions(prefix: int, method: str, old, new) -> Callable:
    return lambda array, shape: positions.resize(array, shape[0], prefix, method, old, new)


def _of_patch(method: str) -> Callable:
    return lambda array, shape: positions.resize_patch(array, shape[0], shape[1], method)


def _of_channels(before: Way | None) -> Callable:
    def make(array, shape):
        if array.shape[2] != shape[2]:
            array = adapted(array, shape[2])
        return before.make(array, shape) if before and array.shape != shape else array

    return make


def _parsed(spec: str) -> tuple[str, str, tuple]:
    """(pattern, method, (grid of the file or None, grid of the network or None)). Raises UserError."""
    pattern, _, rest = spec.partition(":")
    method, _, grids = rest.partition(":")
    match = _GRIDS.fullmatch(grids)
    if grids and not match:
        raise UserError(f"resize={spec!r}: expected the grids of the file and the network, as 14x28-16x32")
    numbers = [int(n) for n in match.groups() if n] if match else []
    sizes = tuple(zip(numbers[::2], numbers[1::2]))
    return pattern, method or "bicubic", (*sizes, None, None)[:2]
