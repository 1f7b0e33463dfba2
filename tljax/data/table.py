"""What every source hands over: one row a photograph, before splits, classes and duplicates are settled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPLITS = ("train", "val", "test")
# The names that data sets in the field give to the three splits.
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Table:
    """One row a photograph. `images[i]` is its encoded bytes or a uint8 array, read when asked for.

    labels: strings, or ints (−1 or None: unlabelled). splits: "train" | "val" | "test".
    keys: equal exactly where the contents of two photographs are equal; None where the source does not know.
    class_names: names of the integer labels, in order, where the source declares them.
    """

    images: Sequence
    labels: list
    names: list[str]
    splits: np.ndarray
    keys: list[str] | None = None
    coarse: list[str] | None = None
    class_names: tuple[str, ...] | None = None
    licence: str = ""
    origin: str = ""
    notes: tuple[str, ...] = ()


def split_name(name: str) -> str | None:
    """ "validation" → "val" and so on; None for a name that no split has."""
    return _SPLIT_NAMES.get(str(name).strip().lower())
