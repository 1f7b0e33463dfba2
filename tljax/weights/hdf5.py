"""Reads Keras weights, `.h5` of Keras 2 and `.weights.h5` of Keras 3, through h5py (extra `keras`)."""

import functools
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tljax.errors import UserError
from tljax.weights.lazy import DEFLATE, Arrays, Entry

MAGIC = b"\x89HDF\r\n\x1a\n"
# What an optimizer keeps beside the weights: `.h5` of Keras 2, `.weights.h5` of Keras 3.
_OPTIMIZER = ("optimizer_weights", "optimizer")
_DEPTH = 64
# deflate, shuffle, fletcher32, LZF. Others make a few bytes any number, or are looked for in libraries elsewhere.
_FILTERS = {1, 2, 3, 32000}
_DAMAGED = (OSError, RuntimeError, ValueError, TypeError, LookupError, OverflowError, AttributeError, MemoryError)


def read(path: str | os.PathLike) -> Arrays:
    """The datasets in `path` by their path within the file (`conv1/conv1/kernel:0`), each read when asked for.

    In a whole model the paths begin below its group `model_weights`; an optimizer's state is left out. Keras 3 calls
    a layer by its class and number (`layers/conv2d_3/vars/0`); where the file says the layer's own name, too (3.6 and
    newer), that is put instead (`layers/conv1/0`). Raises UserError (one line with the file's name) without h5py, for
    a damaged file, for links to other files and for other things than numbers.
    """
    path = os.fspath(path)
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: a Keras file needs h5py: pip install -e '.[keras]'") from None
    return _one_line(path, lambda: _read(path, h5py))


def check_named(path: str | os.PathLike, names: Iterable[str]) -> None:
    """Raises UserError where names are those of a Keras file that tells no layer but by its class and number."""
    if all(re.search(r"/vars/\d+$", name) for name in names):
        raise UserError(
            f"{path} does not say its layers' names, as Keras 3 before 3.6 wrote it: load it in Keras and save it "
            "again, with a newer one or as .h5"
        )


def _one_line(path: str, action: Callable) -> Any:
    try:
        return action()
    except _DAMAGED as error:
        text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))[:160]
        detail = f"{type(error).__name__}: {text}"
        raise UserError(f"{path}: damaged, truncated or no HDF5 file ({detail})") from error


def _read(path: str, h5py: Any) -> Arrays:
    # Locking fails on file systems that only read.
    file = h5py.File(path, "r", locking="best-effort")
    entries: dict[str, Entry] = {}
    seen: set[int] = set()

    def hard(group: Any, name: str, where: str) -> Any:
        # A link may lead to any file of the reader's machine.
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise UserError(f"{path}: {where!r} is a link, which Keras does not write; not followed")
        return group[name]

    def walk(group: Any, prefix: str, depth: int) -> None:
        address = h5py.h5o.get_info(group.id).addr
        if address in seen or depth > _DEPTH:
            raise ValueError(f"the group {prefix} lies in itself or is there twice")
        seen.add(address)
        for name in group:
            where = prefix + name
            if not prefix and name in _OPTIMIZER:
                continue
            item = hard(group, name, where)
            if isinstance(item, h5py.Group):
                walk(item, f"{where}/", depth + 1)
            elif isinstance(item, h5py.Dataset):
                own = _by_layer(prefix, _attribute(path, group, "name")) + name
                entries[where if own in entries else own] = _entry(path, where, item)
            else:
                raise UserError(f"{path}: {where!r} is neither a group nor an array")

    try:
        walk(hard(file, "model_weights", "model_weights") if "model_weights" in list(file) else file, "", 0)
        if not entries:
            raise UserError(f"{path} holds no arrays")
    except BaseException:
        file.close()
        raise
    return Arrays(entries)


def _attribute(path: str, group: Any, name: str) -> Any:
    """An attribute with one value; None where there is none, or many."""
    if name not in group.attrs or group.attrs.get_id(name).shape != ():
        return None
    _check_heaps(path, os.stat(path).st_mtime_ns)
    return group.attrs[name]


@functools.lru_cache(maxsize=1)
def _check_heaps(path: str, changed: int) -> None:
    """Raises ValueError for a global heap, where texts lie, with an object of no size: libhdf5 would read it for ever.

    Follows section III.E of HDF5's file format specification.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        sizes = mapped[9:11] if mapped[8] >= 2 else mapped[13:15]
        if mapped[:8] != MAGIC or sizes != b"\x08\x08":
            raise ValueError("addresses or lengths that have not 8 bytes")
        heap = -1
        while (heap := mapped.find(b"GCOL\x01", heap + 1)) >= 0:
            end = heap + int.from_bytes(mapped[heap + 8 : heap + 16], "little")
            if not heap + 4096 <= end <= len(mapped):
                continue  # numbers that look like one, or a heap that libhdf5 refuses
            at = heap + 16
            while at + 16 <= end:
                index, _, _, size = struct.unpack_from("<HHIQ", mapped, at)
                taken = 16 + (size + 7) // 8 * 8 if index else size
                if not 0 < taken <= end - at:
                    raise ValueError(f"a damaged heap at byte {heap}")
                at += taken


def _by_layer(prefix: str, layer: Any) -> str:
    """`layers/conv2d_3/vars/` by the layer's own name, where the file says it."""
    *outer, _, last = prefix.removesuffix("/").rsplit("/", 2) if prefix.count("/") > 1 else ["", ""]
    if last != "vars" or not isinstance(layer, str) or not layer or "/" in layer:
        return prefix
    return "/".join([*outer, layer, ""])


def _entry(path: str, name: str, dataset: Any) -> Entry:
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{path}: the numbers of {name!r} lie in another file; not read")
    if dataset.shape is None or dataset.dtype.kind not in "fiub":
        raise UserError(f"{path}: {name!r} is of type {dataset.dtype}, which is not read")
    made = dataset.id.get_create_plist()
    filters = [made.get_filter(i)[0] for i in range(made.get_nfilters())]
    if len(set(filters)) < len(filters) or not _FILTERS.issuperset(filters):
        raise UserError(f"{path}: {name!r} is compressed in a way that is not read (filters {filters})")
    shape, size = tuple(dataset.shape), dataset.nbytes
    there = min(dataset.id.get_storage_size(), os.path.getsize(path))
    if dataset.chunks:  # one is unpacked as a whole
        size = max(size, math.prod(dataset.chunks) * dataset.dtype.itemsize)
    # Without this a file of a few bytes could ask for any number of gigabytes of its fill value.
    if size > there * (DEFLATE if dataset.chunks else 1):
        raise ValueError(f"{name} of shape {shape} claims {size} bytes but has {there}")
    return Entry(shape, lambda: _one_line(path, lambda: np.asarray(dataset[()])))
