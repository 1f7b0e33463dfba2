"""Pre-trained weights: where they are, what is known about them (cards), and their strict conversion."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tljax import errors, files, stores
from tljax.errors import UserError
from tljax.weights import hdf5, lazy, lookalike, matcher, parts, readers, resizing, runs
from tljax.weights.cards import CARDS, INSTALL, Card, assumed, from_header, named
from tljax.weights.matcher import Report
from tljax.weights.readers import SUFFIXES, read

__all__ = ["CARDS", "Card", "Loaded", "Report", "beside", "card", "fitting", "load", "read"]

# Above this share of names and leaves that do not pair up, the file is suspected to be of another model.
_OTHER_MODEL = 0.05


@dataclasses.dataclass(frozen=True)
class Loaded:
    """`params` and `batch_stats` as nested dicts of arrays; a reset leaf is its ShapeDtypeStruct still."""

    params: dict
    batch_stats: dict
    card: Card
    report: Report


def card(spec: str, model_name: str = "") -> Card:
    """The card of a catalogue name, of a model's name (its first card), a path, "hf:org/name" or a run's folder.

    A file with the content of one of the catalogue's has that card, one that tljax wrote that of its header, a run
    that of its preprocessing. For any other the usual preprocessing of `model_name` is assumed, and `note` says so.
    Raises UserError for an unknown name or a missing file.
    """
    if catalogued := named(spec):
        return catalogued
    if not _is_path(spec):
        raise errors.unknown("weights", spec, CARDS)
    for known in CARDS.values():
        if known.source == spec:
            return known
    path = _file(spec, spec)
    if runs.is_run(path):
        return runs.card(path, spec)
    content = files.digest(*readers.files(path))
    for known in CARDS.values():
        if known.sha256 == content:
            return dataclasses.replace(known, source=spec)
    if told := from_header(readers.metadata(path), spec, content):
        return told
    return assumed(spec, model_name, content, _input_size(model_name))


def _is_path(spec: str) -> bool:
    """Whether `spec` names a file, and not an entry of the catalogue."""
    known = spec.startswith(("package:", "npm:", "file:", "hf:"))
    return known or "/" in spec or spec.endswith(SUFFIXES) or os.path.exists(spec)


def _file(source: str, name: str) -> Path:
    if source.startswith("hf:") and not source.startswith("hf://"):
        from tljax.weights import hub

        return hub.locate(source, f"weights {name!r}")
    if stores.is_remote(source):
        place = stores.place(source, f"weights {name!r}")
        with contextlib.suppress(Exception):  # a store that cannot be reached: a copy may serve
            if runs.is_run(place):
                return place
    package = source.removeprefix("package:").partition("/")[0] if source.startswith("package:") else ""
    path = files.locate(source, f"weights {name!r}", INSTALL.get(package, ""))
    if runs.is_run(path):
        return path
    if not path.is_dir():
        _fetch_shards(source, path, name)
        return path
    held = readers.inside(path)
    if held is None:
        names = errors.listing([*readers.NAMES, "*.index.json", "model.json"])
        raise UserError(f"weights {name!r}: {path} is a directory, not a file, and holds none of {names}")
    return held


def fitting(found: Card, names: Iterable[str]) -> list[str]:
    """Those models of `names` whose leaves, but for the head's, the file fills exactly. Raises UserError."""
    source = lazy.shapes(read(_file(found.source, found.name)))
    return list(dict.fromkeys(name for name, _ in lookalike.fitting(source, names)))


def beside(source: str, name: str) -> Path | None:
    """The file called `name` that lies with weights, in their folder or repository; None where there is none."""
    if source.startswith("hf:"):
        from tljax.weights import hub

        return hub.beside(source, name)
    try:
        if "://" in source and not source.startswith("file:"):
            return files.locate(f"{source.rpartition('/')[0]}/{name}", name)
        path = files.locate(source, name)
    except UserError:
        return None
    path = (path if path.is_dir() else path.parent) / name
    return path if path.is_file() else None


def _fetch_shards(source: str, path: Path, name: str) -> None:
    """Copies what the local copy of a far index names to the place beside it."""
    if "://" in source and not source.startswith("file:") and readers.is_index(path):
        for shard in parts.names(path):
            files.locate(f"{source.rpartition('/')[0]}/{shard}", f"weights {name!r}")


def _input_size(model_name: str) -> int:
    if not model_name:
        return 224
    from tljax import models

    return models.input_size(model_name)


def load(
    spec: str | Card,
    model_name: str,
    shapes: Mapping[str, Mapping],
    reset: Sequence[str] = (),
    resize: Sequence[str] = (),
    channels: int | None = None,
    tables: Mapping[str, tuple] | None = None,
) -> Loaded:
    """Fills `shapes` ({"params": …, "batch_stats": …}, nested, of ShapeDtypeStruct) with pre-trained arrays.

    reset: stages or path prefixes whose leaves take nothing from the file and come back as in `shapes`; resize: what
    is interpolated where the file has it in another size, positions and patches (tljax.weights.resizing);
    channels: of the network's images, to which the first convolution is adapted, None: it must fit; tables: those of
    another part of the file than the model, as CLIP's text tower.
    The arrays have the leaves' shapes and types. Strict: raises UserError, one line, for weights of another
    model, for missing, unexpected or misshaped leaves, another SHA-256 than the card's, a damaged file.
    """
    found = spec if isinstance(spec, Card) else card(spec, model_name)
    shapes = {"params": {}, "batch_stats": {}, **shapes}
    leaves = {path: tuple(leaf.shape) for path, leaf in matcher.flatten(shapes).items()}
    reset = _patterns(reset)
    resize = _patterns(resize)
    check(found, model_name, leaves, reset, resize)
    with _verified(found) as path:
        arrays = runs.read(path) if runs.is_run(path) else read(path)
        naming, rows = table(found, model_name, list(arrays), tables)
        names = lazy.shapes(arrays)
        ways = resizing.ways(model_name, resize, channels)
        result = matcher.fit(names, rows, leaves, reset, {leaf: way.axes for leaf, way in ways.items()})
        if result.problems:
            if tables is None and result.problems > _OTHER_MODEL * len(names):
                other = lookalike.find(names, model_name)
                if other:
                    raise UserError(
                        f"the keys of {path} look like those of {other[0]} ({other[1]} naming), not {model_name}"
                    )
            hdf5.check_named(path, names)
            raise matcher.mismatch(result, str(path), model_name, naming, rows, resizing.resizable(model_name))
        filled = matcher.fill(arrays, result, shapes, {leaf: way.make for leaf, way in ways.items()})
        adapted = {}
        for leaf in result.resized:
            name, part = result.pairs[leaf]
            before = part.shape(tuple(names[name]))
            if 2 in ways[leaf].axes and before[2] != leaves[leaf][2]:
                adapted[leaf] = resizing.told(leaf, before, leaves[leaf])
        return Loaded(filled["params"], filled["batch_stats"], found, matcher.report(result, shapes, naming, adapted))


@contextlib.contextmanager
def _verified(card: Card) -> Iterator[Path]:
    """Where the card's weights lie; their SHA-256 is compared meanwhile, before other mistakes are told."""
    path = _file(card.source, card.name)
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(files.check, card.sha256, *readers.files(path)) if card.sha256 else None
        try:
            yield path
        finally:
            if hashing:
                hashing.result()


def opened(card: Card) -> tuple[Path, Mapping[str, np.ndarray]]:
    """Where a card's weights lie, and their arrays by name, as the file calls them; its SHA-256 is compared."""
    with _verified(card) as path:
        return path, runs.read(path) if runs.is_run(path) else read(path)


def num_classes(spec: str | Card, model_name: str) -> int:
    """The number of classes that pre-trained weights tell apart, from the shape of their own head.

    Raises UserError for a file that cannot be read or has no head.
    """
    from tljax import models

    found = spec if isinstance(spec, Card) else card(spec, model_name)
    path, arrays = opened(found)
    _, rows = table(found, model_name, list(arrays))
    two, three = (matcher.flatten(models.shapes(models.create(model_name, n))) for n in (2, 3))
    names = lazy.shapes(arrays)
    pairs = matcher.fit(names, rows, {k: () for k in three}).pairs
    for leaf, (name, part) in pairs.items():
        shape = part.shape(names[name])
        for axis, (a, b) in enumerate(zip(two[leaf].shape, three[leaf].shape)):
            if a != b and shape and len(shape) == len(three[leaf].shape):
                return shape[axis]
    raise UserError(f"{path} has no head: nothing tells its classes, so there is no source task")


def check(
    found: Card | None, model_name: str, leaves: Iterable[str], reset: Sequence[str] = (), resize: Sequence[str] = ()
) -> None:
    """Raises UserError for what is wrong before any file is read: a card of another model, patterns without a leaf."""
    resize = _patterns(resize)
    if found and found.model and found.model != model_name and not resizing.of_patches(resize, model_name):
        raise UserError(f"weights {found.name!r} are of the model {found.model}, not {model_name}")
    matcher.check_reset(_patterns(reset), leaves)
    resizing.check(resize, model_name)


def _patterns(patterns: Sequence[str] | str) -> tuple[str, ...]:
    # "head" for ("head",) is a slip that would otherwise reset the stages h, e, a and d.
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def table(
    found: Card, model_name: str, names: list[str], tables: Mapping[str, tuple] | None = None
) -> tuple[str, tuple]:
    """(naming, conversion table) of a file with these names, by default of the model's tables.

    Raises UserError for a naming that the model lacks.
    """
    tables = lookalike.tables(model_name) if tables is None else tables
    if found.naming:
        if found.naming not in tables:
            raise errors.unknown("naming", found.naming, tables)
        return found.naming, tables[found.naming]
    return lookalike.best_of(names, tables)
