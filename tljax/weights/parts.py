"""Weights in several files: an index or a manifest in JSON, and the shards that it names beside it."""

import math
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tljax.errors import UserError, listing, nearest
from tljax.files import parsed
from tljax.weights import lazy
from tljax.weights.lazy import Arrays, Entry

# TensorFlow.js' types of weights, little-endian (its io/types.ts).
DTYPES = {"float32": "<f4", "float16": "<f2", "int32": "<i4", "uint16": "<u2", "uint8": "|u1", "bool": "|b1"}


def names(path: Path) -> list[str]:
    """The names of the files that the JSON file at `path` expects beside it, in order.

    Raises UserError for any other JSON, and for names that lead out of the folder.
    """
    content = _json(path)
    try:
        if "weight_map" in content:
            found = sorted(set(content["weight_map"].values()))
        else:
            found = [name for group in content["weightsManifest"] for name in group["paths"]]
    except (AttributeError, TypeError, KeyError):
        raise _unlike(path) from None
    for name in found:
        # Also no other folder by a drive's letter or a backslash; no file system has longer names.
        plain = isinstance(name, str) and 0 < len(name.encode("utf-8", "replace")) < 256 and name != ".."
        if not plain or Path(name).name != name or {"\\", ":", "\0"} & set(name):
            raise UserError(f"{path} names the file {str(name)[:100]!r}, which does not lie beside it")
    if not found:
        raise UserError(f"{path} names no files")
    if len(set(found)) < len(found):
        raise UserError(f"{path} names the file {max(found, key=found.count)[:100]!r} twice")
    return found


def shards(path: Path) -> list[Path]:
    """The files that the JSON file at `path` names, in order. Raises UserError where one is not there."""
    files = [path.parent / name for name in names(path)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{path}: of the {len(files)} files that it names {len(missing)} are missing: {listing(missing)}"
        )
    return files


def read(path: str | os.PathLike, reader: Callable[[Path], Mapping[str, np.ndarray]]) -> Arrays:
    """The arrays of all shards that the JSON file at `path` names; `reader` reads one of an index.

    An index is that of the Hugging Face hub (`weight_map`), a manifest that of a TensorFlow.js layers model
    (`weightsManifest`). Raises UserError, one line, for missing or short shards and for whatever does not agree.
    """
    path = Path(path)
    files = shards(path)
    content = _json(path)
    if "weight_map" in content:
        return _indexed(path, content["weight_map"], {file.name: reader(file) for file in files})
    return _manifest(path, content)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parsed(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: damaged or truncated JSON ({str(error)[:100]})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict) or not {"weight_map", "weightsManifest"} & set(content):
        raise _unlike(path)
    return content


def _unlike(path: Path) -> UserError:
    return UserError(
        f"{path}: neither an index of shards (weight_map) nor the model.json of a TensorFlow.js layers model "
        "(weightsManifest)"
    )


def _indexed(path: Path, places: Mapping[str, str], shards: Mapping[str, Mapping[str, np.ndarray]]) -> Arrays:
    entries: dict[str, Entry] = {}
    for shard, arrays in shards.items():
        twice = [name for name in arrays if name in entries]
        if twice:
            raise UserError(f"{path}: {listing(twice)} in {shard} and in another of its files")
        entries |= lazy.entries(arrays)
    lost = [name for name, shard in places.items() if name not in shards[shard]]
    if lost:
        where = places[lost[0]]
        near = nearest(lost[0], shards[where])
        raise UserError(f"{path}: {len(lost)} arrays are not where it says, as {lost[0]!r} in {where}{near}")
    return Arrays(entries)


def _manifest(path: Path, content: Mapping[str, Any]) -> Arrays:
    if content.get("format", "layers-model") != "layers-model":
        raise UserError(f"{path}: a TensorFlow.js {str(content['format'])[:40]}, expected a layers-model")
    entries: dict[str, Entry] = {}
    for group in content["weightsManifest"]:
        mapped = [_mapped(path.parent / name) for name in group["paths"]]
        ends = np.cumsum([0, *map(len, mapped)]).tolist()
        start = 0
        if not isinstance(group.get("weights"), list):
            raise UserError(f"{path}: a group of the manifest lists no weights")
        for weight in group["weights"]:
            name, shape, dtype = _described(path, weight)
            if name in entries:
                raise UserError(f"{path}: the weight {name!r} is there twice")
            stop = start + math.prod(shape) * dtype.itemsize
            entries[name] = Entry(shape, _slice(mapped, ends, start, stop, shape, dtype))
            start = stop
        if start != ends[-1]:
            raise UserError(
                f"{path}: its weights take {start} bytes, but {listing(group['paths'], 3)} "
                f"{'has' if len(mapped) == 1 else 'have'} {ends[-1]}: truncated, or of another model"
            )
    return Arrays(entries)


def _described(path: Path, weight: Any) -> tuple[str, tuple[int, ...], np.dtype]:
    """Name, shape and type of one entry of the manifest, checked."""
    if not isinstance(weight, dict) or not isinstance(weight.get("name"), str):
        raise UserError(f"{path}: a weight in the manifest has no name")
    name, shape, dtype = weight["name"], weight.get("shape"), weight.get("dtype")
    if weight.get("quantization"):
        raise UserError(f"{path}: the weight {name!r} is quantised, which is not read: convert without quantisation")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: the weight {name!r} is of type {str(dtype)[:40]}, which is not read")
    # numpy ends at 64 dimensions; no weights come near.
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise UserError(f"{path}: the weight {name!r} has the shape {str(shape)[:40]}")
    return name, tuple(shape), np.dtype(DTYPES[dtype])


def _mapped(file: Path) -> mmap.mmap | bytes:
    try:
        with file.open("rb") as opened:
            # An empty file cannot be mapped.
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(opened.fileno()).st_size else b""
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def _slice(
    mapped: list[mmap.mmap | bytes], ends: list[int], start: int, stop: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], np.ndarray]:
    """The function that reads bytes `start` to `stop` of shards laid one after another; `ends`: where they meet."""

    def load() -> np.ndarray:
        pieces = []
        for content, begin, end in zip(mapped, ends, ends[1:]):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                pieces.append(np.frombuffer(content, np.uint8, last - first, first - begin))
        # One shard alone is looked at where it lies.
        joined = pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint8), *pieces])
        return joined.view(dtype).reshape(shape)

    return load
