"""Adapters in files of their own: what was trained, and the digest of the base that it belongs to (safetensors)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tljax import files, plan
from tljax.adapters.kinds import KINDS, Adapter
from tljax.errors import UserError, listing
from tljax.patterns import matches
from tljax.weights import safetensors

KEY = "tljax.adapters"  # of the file's metadata


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file holds: adapters, values by path (`params/…`, `batch_stats/…`), the digest of their base."""

    adapters: tuple[Adapter, ...]
    values: dict[str, np.ndarray]
    base: str

    def own(self) -> dict[str, np.ndarray]:
        """The values of the adapters alone."""
        return {path: value for path, value in self.values.items() if belongs(self.adapters, path)}


def belongs(adapters: Sequence[Adapter], path: str) -> bool:
    """Whether a path is of a parameter of one of the adapters."""
    return path.startswith("params/") and any(f"/{adapter.name}/" in path for adapter in adapters)


def base_digest(adapters: Sequence[Adapter], values: Mapping[str, Any], without: Mapping[str, Any]) -> str:
    """The digest of all values but those of adapters and those that a file holds itself."""
    base = {p: v for p, v in values.items() if p not in without and not belongs(adapters, p)}
    return plan.combined(plan.digests(base))


def save(
    path: str | Path, adapters: Sequence[Adapter], values: Mapping[str, Any], trained: Sequence[str]
) -> dict[str, np.ndarray]:
    """Writes adapters and all that was trained beside them (a head); returns what was written, by path.

    `values`: everything, by path; `trained`: the paths of what is no longer as in the base. Raises UserError where
    the file cannot be written.
    """
    kept = {p: np.ascontiguousarray(v) for p, v in values.items() if p in set(trained) or belongs(adapters, p)}
    told = [
        {"kind": type(a).__name__} | {k: v for k, v in dataclasses.asdict(a).items() if k != "file"} for a in adapters
    ]
    write(path, kept, {KEY: json.dumps(told), "base": base_digest(adapters, values, kept)})
    return kept


def write(path: str | Path, values: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes arrays by path as a safetensors file, whole or not at all. Raises UserError where it cannot be written."""
    from safetensors.numpy import save_file

    temporary = Path(f"{path}.tmp")
    try:
        save_file({p: np.ascontiguousarray(v) for p, v in values.items()}, temporary, metadata)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def adapters(path: str | Path) -> tuple[Adapter, ...]:
    """The adapters in a file, with the file as the source of their values."""
    return read(path).adapters


def read(path: str | Path) -> Stored:
    """What a file of adapters holds. Raises UserError for a missing file and for any other kind of file."""
    file = files.locate(str(path), f"adapters {str(path)!r}")
    values, metadata = safetensors.read(file), safetensors.metadata(file)
    try:
        told = [dict(fields) for fields in files.parsed(metadata[KEY])]
        found = tuple(KINDS[fields.pop("kind")](**fields, file=str(path)) for fields in told)
        return Stored(found, values, metadata["base"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{file} holds no adapters of tljax: expected what `python -m tljax.adapters --save` writes"
        ) from None


def stored(model: Any, values: Mapping[str, Any], reset: Sequence[str]) -> dict[str, np.ndarray]:
    """The values of those of a model's adapters that come from files, onto the base that is in `values`.

    Raises UserError for another base, naming both digests, and for a file with trained leaves that are neither
    adapters nor to be reset: on their own the adapters would not be what was trained.
    """
    all_adapters, found = getattr(model, "adapters", ()), {}
    for file in dict.fromkeys(adapter.file for adapter in all_adapters if adapter.file):
        kept = read(file)
        own = kept.own()
        others = [p.split("/", 1)[1] for p in kept.values if p not in own]
        lost = [p for p in others if not any(matches(pattern, p) for pattern in reset)]
        if lost:
            raise UserError(
                f"{file} also holds {listing(lost)}, which trained beside its adapters: merge that run first"
            )
        base = base_digest(all_adapters, values, kept.values)
        if base != kept.base:
            raise UserError(f"the adapters in {file} are of the base {kept.base[:16]}, these weights are {base[:16]}")
        wrong = [p for p in own if p not in values or np.shape(values[p]) != own[p].shape]
        if wrong:
            raise UserError(f"the adapters in {file} do not fit the model: {listing(wrong)}")
        found |= own
    return found
