"""Fits the arrays of a file to the leaves of a model, strictly: every name on either side is accounted for.

Works on plain nested dicts. A conversion table is an ordered tuple of rows (pattern, target, transform): the
first row whose regular expression matches a whole name in the file decides. The target is a template for
`match.expand`, or a function of the match, or None (knowingly ignored), and says "params/stem/conv/kernel" or
"batch_stats/stem/bn/mean". A tuple of targets divides the array between them, evenly along its first axis.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from typing import Any, NamedTuple

import numpy as np

from tljax import errors
from tljax.errors import UserError, listing
from tljax.patterns import matches
from tljax.weights import transforms

Target = str | Callable[[re.Match], str] | None
Row = tuple[str, Target | tuple[Target, ...], str]

THREADS, STRIPE = 4, 64


class Part(NamedTuple):
    """What of one name in the file goes where: the `index`th of `of` equal parts along the first axis."""

    leaf: str | None  # None: ignored
    transform: str
    index: int = 0
    of: int = 1

    def cut(self, array: np.ndarray) -> np.ndarray:
        """The part of the file's array, its axes in our order."""
        return transforms.apply(self.transform, np.split(array, self.of)[self.index] if self.of > 1 else array)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape that `cut` gives; None where it cannot be."""
        if self.of > 1:
            if not whole or whole[0] % self.of:
                return None
            whole = (whole[0] // self.of, *whole[1:])
        return transforms.shape(self.transform, whole)


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every leaf (paths without collection), and which names in the file were ignored."""

    loaded: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()  # to other channels, with what was done: "stem/conv/kernel: 3 → 1 channels by sum"
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    numbers: int = 0  # in all loaded leaves of `params`
    naming: str = ""

    def line(self) -> str:
        """One line: how many leaves were loaded, and which were not."""
        parts = [f"{len(self.loaded)} leaves loaded ({self.numbers:,} parameters)"]
        for what in ("reset", "resized", "adapted", "missing", "unexpected"):
            names = getattr(self, what)
            if names:
                parts.append(f"{len(names)} {what}: {listing(names, 4)}")
        return "; ".join(parts)


@dataclasses.dataclass
class Fit:
    """How names of a file and leaves of a model pair up; `problems` is 0 when they do without remainder."""

    pairs: dict[str, tuple[str, Part]] = field(default_factory=dict)  # leaf -> (name in file, what of it)
    reset: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)  # names that no row knows
    unexpected: dict[str, str] = field(default_factory=dict)  # name -> leaf that the model has not
    misshaped: dict[str, tuple[tuple, tuple]] = field(default_factory=dict)  # leaf -> (found, expected)
    twice: dict[str, tuple[str, str]] = field(default_factory=dict)  # leaf -> both names

    @property
    def problems(self) -> int:
        """The number of names and leaves that do not pair up."""
        found = (self.missing, self.unmatched, self.unexpected, self.misshaped, self.twice)
        return sum(map(len, found))


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of "a/b/c" to leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _like(tree: Mapping, flat: Mapping[str, Any], prefix: str = "") -> dict:
    """A tree of the structure of `tree` with the leaves of `flat`."""
    return {
        key: _like(value, flat, f"{prefix}{key}/") if isinstance(value, Mapping) else flat[f"{prefix}{key}"]
        for key, value in tree.items()
    }


def path_of(leaf: str) -> str:
    """The leaf's path within its collection: "params/head/bias" -> "head/bias"."""
    return leaf.split("/", 1)[1]


def covers(patterns: Iterable[str], path: str) -> bool:
    """Whether a pattern, as in a plan's rules, matches the path: `head` names all below it."""
    return any(matches(pattern, path) for pattern in patterns)


def targets(names: Iterable[str], table: Sequence[Row]) -> dict[str, tuple[Part, ...] | None]:
    """For each name its parts, all of it mostly; None where no row matches the whole name."""
    rows = [(re.compile(pattern), target, how) for pattern, target, how in table]
    found: dict[str, tuple[Part, ...] | None] = {}
    for name in names:
        found[name] = None
        for pattern, target, how in rows:
            match = pattern.fullmatch(name)
            if match:
                several = target if isinstance(target, tuple) else (target,)
                leaves = [one(match) if callable(one) else one and match.expand(one) for one in several]
                found[name] = tuple(Part(leaf, how, i, len(leaves)) for i, leaf in enumerate(leaves))
                break
    return found


def fit(
    source: Mapping[str, tuple[int, ...]],
    table: Sequence[Row],
    leaves: Mapping[str, tuple[int, ...]],
    reset: Sequence[str] = (),
    resize: Mapping[str, Sequence[int]] | None = None,
) -> Fit:
    """Pairs names with leaves by their shapes alone.

    source: name in the file → shape; leaves: "params/…" or "batch_stats/…" → shape; reset: stages or path
    prefixes whose leaves take nothing from the file; resize: {leaf: axes in which it may differ}.
    """
    result = Fit(reset=[leaf for leaf in leaves if covers(reset, path_of(leaf))])
    for name, parts in targets(source, table).items():
        if parts is None:
            result.unmatched.append(name)
            continue
        wanted = [part for part in parts if part.leaf is not None and not covers(reset, path_of(part.leaf))]
        if not wanted:
            result.ignored.append(name)
        for part in wanted:
            leaf = part.leaf
            if leaf not in leaves:
                result.unexpected[name] = leaf
            elif leaf in result.pairs:
                result.twice[leaf] = (result.pairs[leaf][0], name)
            else:
                result.pairs[leaf] = (name, part)
                shape, expected = part.shape(tuple(source[name])), tuple(leaves[leaf])
                if shape == expected:
                    continue
                if differ_only(shape, expected, (resize or {}).get(leaf, ())):
                    result.resized.append(leaf)
                else:
                    result.misshaped[leaf] = (tuple(source[name]) if shape is None else shape, expected)
    skipped = set(result.reset)
    result.missing = [leaf for leaf in leaves if leaf not in result.pairs and leaf not in skipped]
    return result


def differ_only(found: tuple[int, ...] | None, expected: tuple[int, ...], axes: Sequence[int]) -> bool:
    """Whether two shapes are of as many axes, and equal but for some of `axes`."""
    if found is None or len(found) != len(expected):
        return False
    return all(a == b or axis in axes for axis, (a, b) in enumerate(zip(found, expected)))


def check_reset(reset: Sequence[str], leaves: Iterable[str]) -> None:
    """Raises UserError for a pattern that covers no leaf, with the nearest stage or path."""
    paths = [path_of(leaf) for leaf in leaves]
    for pattern in reset:
        if not any(covers((pattern,), path) for path in paths):
            stages = list(dict.fromkeys(path.split("/")[0] for path in paths))
            close = errors.nearest(pattern, stages) or errors.nearest(pattern, paths)
            hint = close or f"; there are: {listing(stages, 30)}"
            raise UserError(f"reset={pattern!r} matches no leaf of the model{hint}")


def mismatch(
    result: Fit,
    file: str,
    model: str,
    naming: str,
    table: Sequence[Row],
    resizable: Mapping[str, Sequence[int]] | None = None,
) -> UserError:
    """The error for a fit that leaves a remainder: first ten names of each kind, counts, nearest names."""
    parts = []
    if result.missing:
        parts.append(f"{len(result.missing)} missing: {listing(map(path_of, result.missing))}")
    strange = {**dict.fromkeys(result.unmatched), **result.unexpected}
    if strange:
        shown = [f"{name} ({path_of(leaf)})" if leaf else name for name, leaf in strange.items()]
        parts.append(f"{len(strange)} unexpected: {listing(shown)}" + _nearest(strange, result.missing, table))
    if result.misshaped:
        shown = [
            f"{path_of(leaf)} ({_by(found)}, expected {_by(expected)})"
            for leaf, (found, expected) in result.misshaped.items()
        ]
        parts.append(f"{len(shown)} misshaped: {listing(shown)}")
    if result.twice:
        shown = [f"{path_of(leaf)} by {first} and {second}" for leaf, (first, second) in result.twice.items()]
        parts.append(f"{len(shown)} filled twice: {listing(shown)}")
    known = [*result.missing, *result.misshaped]
    stages = list(dict.fromkeys(path_of(leaf).split("/")[0] for leaf in known))
    hint = f"; to start it afresh: reset={stages[0]!r}" if len(stages) == 1 and not strange else ""
    can = [leaf for leaf, pair in result.misshaped.items() if differ_only(*pair, (resizable or {}).get(leaf, ()))]
    if known and not strange and len(can) == len(known):
        paths = [path_of(leaf) for leaf in can]
        last = {path.split("/")[-1] for path in paths}
        several = f"'**/{min(last)}'" if len(last) == 1 else str(tuple(paths))
        hint = f"; to resize them: resize={several}" if len(paths) > 1 else f"; to resize it: resize={paths[0]!r}"
    return UserError(f"{file} does not fit {model} ({naming} naming): {'; '.join(parts)}{hint}")


def _nearest(strange: Mapping[str, str | None], missing: Sequence[str], table: Sequence[Row]) -> str:
    """For the first strange names: the missing leaf, or the name that a row expects, that is closest."""
    # Row patterns are compared as text, every number as N.
    known = [pattern.replace(r"(\d+)", "N").replace("\\", "") for pattern, _, _ in table]
    hints = []
    for name, leaf in list(strange.items())[:3]:
        if leaf:
            close = [path_of(path) for path in difflib.get_close_matches(leaf, missing, 1, 0.6)]
        else:
            close = difflib.get_close_matches(re.sub(r"\d+", "N", name), known, 1, 0.6)
            close = close or difflib.get_close_matches(name, known, 1, 0.6)
        hints += [f"{name} → {close[0]}"] if close else []
    return f" (nearest: {', '.join(hints)})" if hints else ""


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "a scalar"


def fill(
    source: Mapping[str, np.ndarray],
    result: Fit,
    shapes: Mapping[str, Mapping],
    resize: Mapping[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] | None = None,
) -> dict[str, dict]:
    """The trees of `shapes` with copies of the file's arrays in the leaves' types; reset leaves stay.

    resize: leaf → function from the file's array and the shape wanted to what goes into the leaf.
    """
    leaves = flatten(shapes)

    def filled(leaf: str) -> np.ndarray:
        name, part = result.pairs[leaf]
        array = part.cut(source[name])
        if leaf in result.resized:
            array = resize[leaf](array, tuple(leaves[leaf].shape))
        return copied(array, leaves[leaf].dtype)

    flat = {leaf: leaves[leaf] for leaf in result.reset}
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:  # numpy copies without Python's lock
        flat |= zip(result.pairs, pool.map(filled, result.pairs))
    return _like(shapes, flat)


def copied(array: np.ndarray, dtype: Any) -> np.ndarray:
    """A copy in C order. A copy in any case: the arrays of a file are a view of it, and the file may change."""
    copy = np.empty(array.shape, dtype)
    if array.flags.c_contiguous or array.ndim < 2:
        copy[...] = array
    else:
        # A transposed array in stripes: what is read then stays in the processor's cache until all of it is used.
        for start in range(0, array.shape[-1], STRIPE):
            copy[..., start : start + STRIPE] = array[..., start : start + STRIPE]
    return copy


def report(result: Fit, shapes: Mapping[str, Mapping], naming: str, adapted: Mapping[str, str] | None = None) -> Report:
    """What `fill` did with a fit without problems; `adapted`: {leaf: what was done to its channels}."""
    adapted = adapted or {}
    leaves = flatten(shapes)
    loaded = list(result.pairs)
    return Report(
        loaded=tuple(map(path_of, loaded)),
        reset=tuple(map(path_of, result.reset)),
        resized=tuple(path_of(leaf) for leaf in result.resized if leaf not in adapted),
        adapted=tuple(adapted.values()),
        ignored=tuple(result.ignored),
        numbers=sum(int(np.prod(leaves[leaf].shape)) for leaf in loaded if leaf.startswith("params/")),
        naming=naming,
    )
