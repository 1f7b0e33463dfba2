"""Tells what kind of weights file a path is, by its content before its suffix, and reads it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tljax.errors import UserError

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".npz")


def read(path: str | Path) -> Mapping[str, np.ndarray]:
    """The arrays of a weights file (.pth, safetensors, .npz) by name. Raises UserError, one line."""
    from tljax.weights import npz, pth, safetensors

    path = Path(path)
    kind = _kind(path)
    if kind == "safetensors":
        return safetensors.read(path)
    if kind == "npz":
        return npz.read(path)
    return pth.read(path)


def _kind(path: Path) -> str:
    from tljax.weights import npz, safetensors

    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start.startswith(b"PK\x03\x04"):
            return "npz" if npz.looks_like(path) or path.suffix == ".npz" else "pth"
        if safetensors.looks_like(path):
            return "safetensors"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return {".safetensors": "safetensors", ".npz": "npz"}.get(path.suffix, "pth")
