"""Who is in train, val and test: stratified fractions and folds, and no photograph in two places."""

import re
from collections import Counter, defaultdict

import numpy as np

from tljax.errors import UserError, listing

FORMS = '"split", "fold:2/5", "fraction:0.1" or "none"'


def parse(field: str, spec: str, allowed: tuple[str, ...]) -> tuple:
    """("split",) | ("none",) | ("fold", k, n) | ("fraction", f) of a field's text; raises UserError."""
    spec = str(spec).strip()
    if spec in ("split", "none") and spec in allowed:
        return (spec,)
    if "fold" in allowed and (match := re.fullmatch(r"fold:(\d+)/(\d+)", spec)):
        k, n = int(match[1]), int(match[2])
        if n >= 2 and 1 <= k <= n:
            return ("fold", k, n)
        raise UserError(f"data.{field}={spec!r}: expected fold:k/n with n >= 2 and k from 1 to n")
    if "fraction" in allowed and (match := re.fullmatch(r"fraction:(\d*\.?\d+)", spec)):
        fraction = float(match[1])
        if 0 < fraction < 1:
            return ("fraction", fraction)
        raise UserError(f"data.{field}={spec!r}: expected a fraction between 0 and 1")
    forms = FORMS if "fold" in allowed else '"split" or "fraction:0.2"'
    raise UserError(f"data.{field}={spec!r}: expected {forms}")


def folds(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The fold, 0 … n−1, of each photograph: sizes differ by at most one, within every class and in all."""
    fold = np.empty(len(labels), np.int32)
    dealt = 0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = np.random.default_rng((seed, int(label))).permutation(members)
        # Dealing goes on where the last class stopped; otherwise fold 0 would get every class's remainder.
        fold[members] = (dealt + np.arange(len(members))) % n
        dealt += len(members)
    return fold


def fraction(labels: np.ndarray, part: float, seed: int) -> np.ndarray:
    """A mask that takes `part` of every class, rounded, at least one photograph, and leaves at least one."""
    taken = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = np.random.default_rng((seed, int(label))).permutation(members)
        count = min(max(1, round(part * len(members))), len(members) - 1)
        taken[members[:count]] = True
    return taken


def first_of_each(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """A mask of `limit` photographs a class; a smaller limit takes a subset of what a larger one takes."""
    taken = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        taken[np.random.default_rng((seed, int(label))).permutation(members)[:limit]] = True
    return taken


def unique(
    keys: list[str], labels: np.ndarray, splits: np.ndarray, names: list[str], skip: bool = False
) -> tuple[np.ndarray, list[str]]:
    """A mask that keeps each photograph once, and lines that say what was dropped.

    A photograph that two splits share stays where it measures: in test before val before train. Equal
    contents with different labels raise UserError, as no choice between them is right; `skip` drops them all.
    """
    groups = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    kept = np.ones(len(keys), bool)
    dropped, conflicts = Counter(), []
    rank = {"test": 0, "val": 1, "train": 2}
    for rows in groups.values():
        if len(rows) == 1:
            continue
        if len({int(labels[row]) for row in rows}) > 1:
            conflicts.append(" = ".join(names[row] for row in rows[:2]))
            kept[rows] = False
            continue
        first = min(rows, key=lambda row: rank[splits[row]])
        for row in rows:
            if row != first:
                kept[row] = False
                dropped[splits[row], splits[first]] += 1
    if conflicts and not skip:
        raise UserError(
            f"photographs that occur with different labels: {len(conflicts)} ({listing(conflicts, 3)}); "
            "data.on_bad='skip' leaves them out"
        )
    lines = [f"photographs with different labels skipped: {len(conflicts)}"] if conflicts else []
    for (loser, winner), count in sorted(dropped.items()):
        where = f"within {loser}" if loser == winner else f"from {loser}, where {winner} has them too"
        lines.append(f"repeated photographs dropped {where}: {count}")
    return kept, lines
