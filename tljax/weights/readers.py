"""Tells what kind of weights file a path is, by its content before its suffix, and reads it."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tljax.errors import UserError, listing
from tljax.weights import parts

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".npz", ".h5", ".json")
# The files of a folder that stand for it, the first that is there.
NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_KINDS = {".safetensors": "safetensors", ".npz": "npz", ".h5": "hdf5", ".json": "json"}


def read(path: str | Path) -> Mapping[str, np.ndarray]:
    """The arrays of a weights file by name; of a JSON file, those of all files that it names.

    Formats: PyTorch's (.pth, .bin), safetensors and its index of shards, .npz, Keras' HDF5, the model.json of
    TensorFlow.js. Raises UserError, one line.
    """
    from tljax.weights import hdf5, npz, pth, safetensors

    path = Path(path)
    kind = _kind(path)
    if kind == "json":
        return parts.read(path, _shard)
    return {"safetensors": safetensors, "npz": npz, "hdf5": hdf5, "pth": pth}[kind].read(path)


def metadata(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors; {} for all other kinds."""
    from tljax.weights import safetensors

    if _kind(path) != "safetensors":
        return {}
    safetensors.read(path)  # finds it sound
    return safetensors.metadata(path)


def _shard(path: Path) -> Mapping[str, np.ndarray]:
    if _kind(path) == "json":
        raise UserError(f"{path}: an index names it as a file of arrays, and it is JSON")
    return read(path)


def files(path: Path) -> list[Path]:
    """All files that hold what `path` stands for: itself, and the shards of an index. Raises UserError."""
    if _kind(path) != "json":
        return [path]
    return [path, *parts.shards(path)]


def is_index(path: Path) -> bool:
    """Whether the file is JSON that names the files with the arrays. Raises UserError where it cannot be read."""
    return _kind(path) == "json"


def inside(folder: Path) -> Path | None:
    """The file that stands for a folder of weights, or None. Raises UserError where several might."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    # As variants are called (model.fp16.safetensors.index.json), and TensorFlow.js' models.
    found = [*sorted(folder.glob("*.index.json")), *(f for f in [folder / "model.json"] if f.is_file())]
    if len(found) > 1:
        raise UserError(f"{folder} holds several sets of weights, name one: {listing(f.name for f in found)}")
    return found[0] if found else None


def _kind(path: Path) -> str:
    from tljax.weights import hdf5, safetensors

    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start.startswith(b"PK\x03\x04"):
            return _kind_of_archive(path)
        if start == hdf5.MAGIC:
            return "hdf5"
        if safetensors.looks_like(path):
            return "safetensors"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if start.lstrip().startswith(b"{"):
        return "json"
    return _KINDS.get(path.suffix, "pth")


def _kind_of_archive(path: Path) -> str:
    """npz, where every member is an array; else pth, whose archives have a data.pkl."""
    try:
        with zipfile.ZipFile(path) as opened:
            names = opened.namelist()
    except (zipfile.BadZipFile, ValueError, LookupError, NotImplementedError, struct.error):
        names = []  # for the reader to say what is wrong with it
    if "model.weights.h5" in names:
        raise UserError(f"{path}: a Keras archive: unpack it (unzip) and name the model.weights.h5 that is in it")
    arrays = bool(names) and all(name.endswith(".npy") for name in names)
    return "npz" if arrays or path.suffix == ".npz" else "pth"
