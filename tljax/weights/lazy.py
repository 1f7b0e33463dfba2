"""Arrays that are read from their file when they are asked for, one at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

# Deflate can make a run of bytes at most this many times smaller: a larger claim is false.
DEFLATE = 1032


class Entry(NamedTuple):
    """What is known of an array before it is read, and the function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Arrays(Mapping):
    """name → array; every access reads anew, so that memory holds no more than what the caller keeps."""

    def __init__(self, entries: Mapping[str, Entry]):
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """name → shape, without reading a number."""
    if isinstance(arrays, Arrays):
        return {name: tuple(entry.shape) for name, entry in arrays.entries.items()}
    return {name: array.shape for name, array in arrays.items()}


def entries(arrays: Mapping[str, np.ndarray]) -> dict[str, Entry]:
    """name → entry, to be put into one `Arrays` with those of other files."""
    if isinstance(arrays, Arrays):
        return arrays.entries
    return {name: Entry(array.shape, lambda array=array: array) for name, array in arrays.items()}
