"""Which setting of a sweep is the best, and from which others its repeats can tell it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tljax.grid import REPEATS
from tljax.report import metrics

FEW = 3  # fewer pairs than these are no test


@dataclass(frozen=True)
class Setting:
    """The rows of runs that repeat one experiment: they differ in seeds and folds alone."""

    fields: dict
    rows: tuple[dict, ...]

    def scores(self, split: str, name: str) -> dict[tuple, float]:
        """{(data.val, data.fold_seed, seed): figure} of the repeats that have one."""
        return {repeat(row): row[split][name] for row in self.rows if row[split] and name in row[split]}

    @property
    def failed(self) -> tuple[dict, ...]:
        """The rows of repeats that have diverged."""
        return tuple(row for row in self.rows if row["status"].startswith("diverged"))

    @property
    def eliminated(self) -> bool:
        """Whether it was stopped for being worse than others (`tljax.halving`): its figures are of fewer steps."""
        return any(row["status"].startswith("eliminated") for row in self.rows)

    def interval(self, split: str, name: str) -> tuple[float, float]:
        """(mean, half the width of its 95 % interval) over the repeats; nan where there are too few."""
        return interval(self.scores(split, name))


def repeat(row: dict) -> tuple:
    """What tells a row from its repeats."""
    given = row.get("config", {}) | row["fields"]
    return (given.get("data.val", "split"), given.get("data.fold_seed", 0), given.get("seed", 0))


def settings(rows: Sequence[dict]) -> list[Setting]:
    """The rows by what they repeat, in the order of the sweep."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        key = json.dumps({field: value for field, value in row["fields"].items() if field not in REPEATS})
        found.setdefault(key, []).append(row)
    without = lambda fields: {field: value for field, value in fields.items() if field not in REPEATS}
    return [Setting(without(same[0]["fields"]), tuple(same)) for same in found.values()]


# ---- statistics


def overlap(repeats: Sequence[tuple]) -> float:
    """n_val / n_train of repeats that divide the same photographs anew: folds and drawn fractions; else 0."""
    if len({(val, fold_seed) for val, fold_seed, _ in repeats}) < 2:
        return 0.0
    shares = []
    for val, *_ in repeats:
        if match := re.fullmatch(r"fold:\d+/(\d+)", val):
            shares.append(1 / (int(match[1]) - 1))
        elif match := re.fullmatch(r"fraction:(.+)", val):
            shares.append(float(match[1]) / (1 - float(match[1])))
        else:
            return 0.0
    return float(np.mean(shares))


def independent(scores: Mapping[tuple, float]) -> tuple[np.ndarray, float]:
    """(figures, overlap): one figure a repeat, or one a division of the photographs, as its mean over seeds."""
    shared = overlap(list(scores))
    if not shared:
        return np.array(list(scores.values()), float), 0.0
    divisions: dict[tuple, list[float]] = {}
    for (val, fold_seed, _), value in scores.items():
        divisions.setdefault((val, fold_seed), []).append(value)
    return np.array([np.mean(values) for values in divisions.values()]), shared


def interval(scores: Mapping[tuple, float], level: float = 0.95) -> tuple[float, float]:
    """(mean, half the width) of Student's interval of the mean; half is nan for fewer than `FEW` figures.

    Where training sets overlap the variance is corrected as in `paired`.
    """
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    values, shared = independent(scores)
    n = len(values)
    if n < FEW:
        return (float(values.mean()) if n else math.nan), math.nan
    half = stdtrit(n - 1, (1 + level) / 2) * values.std(ddof=1) * math.sqrt(1 / n + shared)
    return float(values.mean()), float(half)


class Paired(NamedTuple):
    """A paired comparison: pairs, mean difference, two-sided p (None: too few pairs), if its variance is corrected."""

    n: int
    difference: float
    p: float | None
    corrected: bool


def paired(one: Mapping[tuple, float], other: Mapping[tuple, float]) -> Paired:
    """Student's t-test of the differences between two settings' figures, paired by seed and fold.

    Training sets of a cross-validation overlap, and its figures are not independent: the variance of the mean is
    (1/n + n_val/n_train) s² instead of s²/n (Nadeau & Bengio 2003, "Inference for the generalization error").
    """
    from scipy.special import stdtr

    differences, shared = independent({key: one[key] - other[key] for key in one if key in other})
    n, mean = len(differences), float(differences.mean()) if len(differences) else math.nan
    if n < FEW:
        return Paired(n, mean, None, bool(shared))
    error = differences.std(ddof=1) * math.sqrt(1 / n + shared)
    if not error:
        return Paired(n, mean, 0.0 if mean else 1.0, bool(shared))
    return Paired(n, mean, float(2 * stdtr(n - 1, -abs(mean) / error)), bool(shared))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number (Holm 1979); None stays."""
    order = sorted((i for i, p in enumerate(values) if p is not None), key=lambda i: values[i])
    corrected, least = list(values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * values[i]))
        corrected[i] = least
    return corrected


# ---- the ranking


class Metric(NamedTuple):
    """A figure of val or test: `by("val/nll")` is the one that chooses, `shown("val/nll")` the one told of test."""

    split: str
    name: str

    @property
    def sign(self) -> int:
        """1 where more is better."""
        return metrics.sign(self.name)

    def __str__(self) -> str:
        return f"{self.split}/{self.name}"


def by(metric: str) -> Metric:
    """The figure of `config.metric`."""
    return Metric(*metric.split("/"))


def shown(metric: str) -> Metric:
    """The figure of test beside it: accuracy, or what was chosen by where that is a share as well."""
    return Metric("test", "macro_f1" if metric == "val/macro_f1" else "accuracy")


class Ranked(NamedTuple):
    """A setting in its place, with its comparison with the first on val and on test; both p by `holm`."""

    setting: Setting
    value: float  # the mean of the metric; nan where a repeat has none
    val: Paired | None  # None: it is the first
    test: Paired | None


def value(setting: Setting, metric: Metric) -> float:
    """The mean of a setting's figure, nan unless all of its repeats have one: who has diverged is the worst.

    So is who was eliminated, whatever his figures were.
    """
    scores = setting.scores(*metric)
    whole = len(scores) == len(setting.rows) and not setting.eliminated
    return float(np.mean(list(scores.values()))) if whole else math.nan


def ranked(found: Sequence[Setting], metric: str) -> list[Ranked]:
    """Settings from the best by `config.metric`, a figure of val, to the worst, each compared with the best."""
    chooses, told = by(metric), shown(metric)
    means = [value(setting, chooses) for setting in found]
    order = sorted(range(len(found)), key=lambda i: math.inf if math.isnan(means[i]) else -chooses.sign * means[i])
    if not order or math.isnan(means[order[0]]):
        return [Ranked(found[i], means[i], None, None) for i in order]
    first = found[order[0]]
    tests = [[paired(found[i].scores(*of), first.scores(*of)) for i in order[1:]] for of in (chooses, told)]
    for column in tests:
        corrected = holm([test.p for test in column])
        column[:] = [test._replace(p=p) for test, p in zip(column, corrected)]
    others = [Ranked(found[i], means[i], val, test) for i, val, test in zip(order[1:], *tests)]
    return [Ranked(first, means[order[0]], None, None), *others]
