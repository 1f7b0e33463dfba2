"""Reads numpy's .npz files, as vision_transformer and big_vision write them, without unpickling anything."""

import io
import math
import mmap
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from tljax.errors import UserError
from tljax.weights import archive
from tljax.weights.lazy import DEFLATE, Arrays, Entry

# The header of an array of numbers takes about a hundred bytes.
_HEADER = 10_000
_DAMAGED = (ValueError, TypeError, LookupError, OverflowError, EOFError, SyntaxError, RecursionError, MemoryError)
_DAMAGED = (*_DAMAGED, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError)
_DAMAGED = (*_DAMAGED, tokenize.TokenError)


def read(path: str | os.PathLike) -> Arrays:
    """The arrays in `path` by key, each read when asked for: np.savez memory-mapped, np.savez_compressed unpacked.

    Arrays of two-byte void are bfloat16, as numpy stores JAX's. Raises UserError (one line with the file's name)
    for a damaged file, and for arrays of Python objects, which are pickles and are never loaded.
    """
    path = os.fspath(path)
    return _one_line(path, lambda: _read(path))


def _one_line(path: str, action: Callable):
    try:
        return action()
    except _DAMAGED as error:
        text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))[:160]
        detail = f"{type(error).__name__}: {text}"
        raise UserError(f"{path}: damaged, truncated or no npz file ({detail})") from error


def _read(path: str) -> Arrays:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    entries: dict[str, Entry] = {}
    with zipfile.ZipFile(path) as opened:
        for info in opened.infolist():
            name = info.filename.removesuffix(".npy")
            if name == info.filename:
                raise ValueError(f"{name} in the archive is no array")
            if name in entries:
                raise ValueError(f"{name} is in the archive twice")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is compressed in a way that numpy does not use")
            if info.file_size > info.compress_size * DEFLATE:
                raise ValueError(f"{name} claims {info.file_size} bytes, more than {info.compress_size} can unpack to")
            with opened.open(info) as stream:
                start = io.BytesIO(stream.read(_HEADER))
            entries[name] = _entry(path, mapped, info, name, start)
    if not entries:
        raise UserError(f"{path} holds no arrays")
    return Arrays(entries)


def _entry(path: str, mapped: mmap.mmap, info: zipfile.ZipInfo, name: str, start: io.BytesIO) -> Entry:
    """The array whose header `start` holds; what the header claims is compared with the member's size."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(start)
    if version not in readers:
        raise ValueError(f"{name} is of version {version} of numpy's format")
    shape, fortran, dtype = readers[version](start)
    if dtype.hasobject:
        raise UserError(f"{path}: {name!r} holds pickled Python objects, which are refused: only numbers are read")
    if dtype == np.dtype("V2"):
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    elif dtype.kind not in "fiub":
        raise UserError(f"{path}: {name!r} is of type {dtype}, which is not read")
    offset, size = start.tell(), math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or offset + size != info.file_size:
        raise ValueError(f"{name} of shape {shape} does not take the {info.file_size} bytes that it has")

    def view(buffer: mmap.mmap | bytes, offset: int) -> np.ndarray:
        return np.ndarray(shape, dtype, buffer, offset, order="F" if fortran else "C")

    def load() -> np.ndarray:
        if size == 0:
            return np.zeros(shape, dtype)
        if info.compress_type == zipfile.ZIP_STORED:
            return view(mapped, archive.stored(mapped, info, "numpy").start + offset)
        with zipfile.ZipFile(path) as opened, opened.open(info) as stream:
            return view(stream.read(info.file_size), offset)

    return Entry(shape, lambda: _one_line(path, load))
