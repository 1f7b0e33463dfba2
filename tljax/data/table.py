"""What every source hands over: one row a photograph, before splits, classes and duplicates are settled."""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tljax.errors import UserError

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


def locate(path: str, extra: str = "") -> Path:
    """The file or directory of `path`; `package:name/…` is looked up in a package without importing that.

    Raises UserError where the package is not installed or nothing lies there.
    """
    if not path.startswith("package:"):
        found = Path(path).expanduser()
    else:
        package, _, inside = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            what = f"'tljax[{extra}]'" if extra else package
            raise UserError(f"the data are in the package {package}, which is not installed: pip install {what}")
        found = Path(next(iter(spec.submodule_search_locations))) / inside
    if not found.exists():
        raise UserError(f"no such file or directory: {found}")
    return found


def check_sha256(files: Sequence[Path], expected: str) -> None:
    """Compares the SHA-256 of the files' contents, one after another, with `expected`; raises UserError."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    if digest.hexdigest() != expected.lower():
        raise UserError(f"{files[0]}: SHA-256 is {digest.hexdigest()}, expected {expected}")
