"""Reads safetensors files as memory-mapped arrays, bfloat16 included, and writes them an array at a time."""

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tljax.errors import UserError

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def looks_like(path: str | os.PathLike) -> bool:
    """Whether the file starts as safetensors do: a short header length, then the brace of its JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors in `path`: name → read-only array in the stored type (bfloat16: ml_dtypes).

    Raises UserError (one line with the file's name) for a damaged file or a type that no array here can have.
    """
    import ml_dtypes
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    try:
        # The library checks header, offsets and sizes. Its own numpy reader has not always known bfloat16.
        with safe_open(path, framework="numpy") as checked:
            names = list(checked.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, truncated or no safetensors file ({str(error)[:160]})") from None
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:start])
    arrays = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name!r} is of type {entry['dtype']}, which is not read")
        dtype = np.dtype(ml_dtypes.bfloat16 if entry["dtype"] == "BF16" else _DTYPES[entry["dtype"]])
        shape, offset = entry["shape"], start + entry["data_offsets"][0]
        try:
            # An empty array may lie at the end of the file, where numpy takes no view.
            arrays[name] = np.zeros(shape, dtype) if 0 in shape else np.ndarray(shape, dtype, mapped, offset)
        except (ValueError, TypeError) as error:  # more dimensions, or longer ones, than numpy has
            raise UserError(f"{path}: {name!r} of shape {str(shape)[:80]} is not read ({error})") from None
    return arrays


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """The text that a file, which `read` has found sound, carries beside its tensors."""
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="numpy") as opened:
        return opened.metadata() or {}


def write(path: str | os.PathLike, arrays: Mapping[str, Callable[[], np.ndarray]], metadata: Mapping[str, str]) -> int:
    """Writes what the functions return, one at a time, whole or not at all; returns the number of bytes.

    Raises UserError where the file cannot be written or a type cannot be stored.
    """
    path, types = Path(path), {name: code for code, name in _DTYPES.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    told = {"__metadata__": dict(metadata)}
    # The header comes first and tells where all end: room is left for it, and what is not needed stays blank.
    room = len(json.dumps(told)) + sum(len(json.dumps(name)) + 300 for name in arrays)
    room += -room % 8
    try:
        with temporary.open("wb") as file:
            file.seek(8 + room)
            end = 0
            for name, array in arrays.items():
                array = np.asarray(array())
                if array.dtype.name not in types:
                    raise UserError(f"{path}: {name!r} is of type {array.dtype}, which safetensors does not have")
                start, end = end, end + array.nbytes
                told[name] = {"dtype": types[array.dtype.name], "shape": array.shape, "data_offsets": (start, end)}
                little = array.astype(array.dtype.newbyteorder("<"), copy=False)
                file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
            header = json.dumps(told).encode()
            assert len(header) <= room
            file.seek(0)
            file.write(room.to_bytes(8, "little") + header.ljust(room))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return 8 + room + end
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
