"""Reads PyTorch state dicts without PyTorch: the zip format, and the one from before PyTorch 1.6.

Follows the layout that `torch.save` writes (torch/serialization.py); pickles.py says what a file may contain.
"""

import io
import math
import mmap
import os
import re
import struct
import zipfile
from typing import Any

import numpy as np

from tljax.errors import UserError, listing
from tljax.weights import archive, pickles
from tljax.weights.pickles import Module, Storage, Tensor

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
# The names under which training scripts file the state dict among other things.
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "module")

_DAMAGED = (*pickles.DAMAGED, struct.error, zipfile.BadZipFile, NotImplementedError, OSError, RecursionError)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The state dict in `path`: name → read-only memory-mapped array, in its stored type (bfloat16 included).

    Nothing in the file is executed. Raises UserError (one line with the file's name) for a file that is
    damaged, is no weights file, or asks for more than tensors. Formats: torch.save of PyTorch 0.4 to 2.x,
    TorchScript, of which the code is left alone.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UserError(f"{path}: the file is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = _zip_format(path, mapped) if mapped[:4] == b"PK\x03\x04" else _old_format(mapped)
        return _state_dict(path, content)
    except pickles.Refused as refusal:
        raise UserError(
            f"{path}: refused {_one_line(refusal)} in the pickle: only tensors are read; nothing in the file was run"
        ) from None
    except _DAMAGED as error:
        detail = f"{type(error).__name__}: {_one_line(error)}"
        raise UserError(f"{path}: damaged, truncated or no PyTorch weights file ({detail})") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in text)[:160]


def _zip_format(path: str, mapped: mmap.mmap) -> Any:
    """data.pkl plus one uncompressed member data/<key> for each storage."""
    with zipfile.ZipFile(path) as opened:
        members = {info.filename: info for info in opened.infolist()}
    programs = [name for name in members if re.fullmatch(r"([^/]*/)?data\.pkl", name)]
    if len(programs) != 1:
        raise ValueError("a zip archive without one data.pkl")
    root = programs[0].removesuffix("data.pkl")
    content = pickles.run(io.BytesIO(mapped[_member(mapped, members[programs[0]])]))

    order = "little"
    if f"{root}byteorder" in members:
        order = mapped[_member(mapped, members[f"{root}byteorder"])].decode("ascii", "replace").strip()
    if order not in ("little", "big"):
        raise ValueError(f"unknown byte order {order!r}")

    places: dict[str, tuple[int, int]] = {}

    def place(storage: Storage) -> tuple[int, int]:
        if storage.key not in places:
            name = f"{root}data/{storage.key}"
            if name not in members:
                raise ValueError(f"no member {name}")
            span = _member(mapped, members[name])
            places[storage.key] = (span.start, span.stop - span.start)
        return places[storage.key]

    return _arrays(_tensors_of(content) if type(content) is Module else content, mapped, place, order)


def _tensors_of(module: Module) -> dict[str, Tensor]:
    """The tensors of a TorchScript module and those inside it, by the names of a state dict."""
    found, waiting, seen = {}, [("", module.attributes)], set()
    while waiting:
        prefix, attributes = waiting.pop()
        # A short program could otherwise give one module any number of names, of any length.
        if id(attributes) in seen or len(prefix) > 500:
            raise pickles.Refused("one module under several names, or very long ones,")
        seen.add(id(attributes))
        for name, value in attributes.items():
            if type(value) is Tensor:
                found[f"{prefix}{name}"] = value
            elif type(value) is Module:
                waiting.append((f"{prefix}{name}.", value.attributes))
    return found


def _member(mapped: mmap.mmap, info: zipfile.ZipInfo) -> slice:
    return archive.stored(mapped, info, "PyTorch")


def _old_format(mapped: mmap.mmap) -> Any:
    """Pickles (magic number, protocol, system, object, storage keys), then storages: int64 count, numbers."""
    if pickles.run(mapped) != MAGIC:
        raise ValueError("a pickle, but not one of torch.save")
    if pickles.run(mapped) != PROTOCOL:
        raise ValueError("an unknown version of the format")
    pickles.run(mapped)  # sizes of the writer's C types; the numbers are little-endian whatever it says
    content = pickles.run(mapped)
    keys = pickles.run(mapped)
    storages = {tensor.storage.key: tensor.storage for tensor in _tensors(content)}
    # A key stands in the list without its type: unless a tensor uses it the way to the next one is unknown.
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise ValueError("storages that belong to no tensor")
    position = mapped.tell()
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        (numel,) = struct.unpack("<q", mapped[position : position + 8])
        if numel != storages[key].numel:
            raise ValueError(f"storage {key} has {numel} elements, expected {storages[key].numel}")
        size = numel * _dtype(storages[key].dtype).itemsize
        if position + 8 + size > len(mapped):
            raise ValueError(f"the file ends at byte {len(mapped)}, within storage {key}")
        places[key] = (position + 8, size)
        position += 8 + size
    return _arrays(content, mapped, lambda storage: places[storage.key], "little")


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _tensors(content: Any) -> list[Tensor]:
    """The tensors in the dicts of `content`; a dict is visited once, whatever refers to it."""
    found, waiting, seen = [], [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif type(item) in (dict, list, tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if type(item) is dict else item)
    return found


def _arrays(content: Any, mapped: mmap.mmap, place: Any, order: str) -> Any:
    """`content` with the tensors of its dicts, two levels deep, as arrays."""
    done: dict[int, dict] = {}  # a dict that many names refer to is converted once

    def convert(value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return _array(value, mapped, place, order)
        if type(value) is dict and depth:
            if id(value) not in done:
                done[id(value)] = {}
                done[id(value)].update({key: convert(item, depth - 1) for key, item in value.items()})
            return done[id(value)]
        return value

    return convert(content, 2)


def _array(tensor: Tensor, mapped: mmap.mmap, place: Any, order: str) -> np.ndarray:
    """A view of the file. Every size is checked against the file before numpy sees it."""
    storage, offset, shape, stride = tensor
    start, size = place(storage)
    dtype = _dtype(storage.dtype)
    if size != storage.numel * dtype.itemsize:
        expected = f"{storage.numel} × {dtype.itemsize}"
        raise ValueError(f"storage {storage.key} has {size} bytes, expected {expected}")
    numel = storage.numel
    if storage.view_numel is not None:
        if storage.start + storage.view_numel > numel:
            raise ValueError(f"a view ends behind the end of storage {storage.key}")
        start, numel = start + storage.start * dtype.itemsize, storage.view_numel
    if len(shape) != len(stride):
        raise ValueError("a tensor with another number of strides than of dimensions")
    count = math.prod(shape)
    if count == 0:
        return np.zeros(shape, dtype)
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride))
    if last >= numel:
        raise ValueError(f"a tensor of shape {shape} reaches behind the end of storage {storage.key}")
    if count > numel:  # expanded, by a stride of 0, to any size; weights are not
        raise ValueError(f"a tensor of shape {shape} has more elements than its storage {storage.key}")
    strides = [step * dtype.itemsize for step in stride]
    where = {"buffer": mapped, "offset": start + offset * dtype.itemsize, "strides": strides}
    if order == "little" or dtype.itemsize == 1:
        return np.ndarray(shape, dtype.newbyteorder("<") if dtype.kind in "fiu" else dtype, **where)
    if storage.dtype == "bfloat16":  # ml_dtypes knows the machine's byte order only
        return np.ndarray(shape, ">u2", **where).astype(np.uint16).view(dtype)
    return np.ndarray(shape, dtype.newbyteorder(">"), **where)


def _state_dict(path: str, content: Any) -> dict[str, np.ndarray]:
    if isinstance(content, dict):
        inner = [name for name in WRAPPERS if name in content and _is_state_dict(content[name])]
        if len(inner) == 1:
            content = content[inner[0]]
        elif len(inner) > 1:
            raise UserError(f"{path}: several state dicts in one file ({', '.join(inner)}): save one alone")
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds {_kind(content)}, expected a state dict (name → tensor)")
    wrong = [f"{_shown(key)} ({_kind(value)})" for key, value in content.items() if not _is_entry(key, value)]
    if wrong:
        raise UserError(f"{path}: not a state dict: {len(wrong)} entries are no tensors: {listing(wrong)}")
    # DataParallel puts this before every name.
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def _is_entry(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, np.ndarray)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_entry(*item) for item in value.items())


def _shown(key: Any) -> str:
    return repr(key[:60]) if isinstance(key, str | bytes) else f"a {type(key).__name__} as key"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "one tensor"
    if value is None or (isinstance(value, dict) and not value):
        return "nothing"
    return f"a {type(value).__name__}"
