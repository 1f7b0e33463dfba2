"""Reads safetensors files as memory-mapped arrays, bfloat16 included."""

import json
import mmap
import os

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
        # An empty array may lie at the end of the file, where numpy takes no view.
        arrays[name] = np.zeros(shape, dtype) if 0 in shape else np.ndarray(shape, dtype, mapped, offset)
    return arrays


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """The text that a file, which `read` has found sound, carries beside its tensors."""
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="numpy") as opened:
        return opened.metadata() or {}
