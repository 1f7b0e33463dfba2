"""What a sweep's pictures show: which axis is the abscissa, which one makes lines, and how their values are written."""

import ast
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tljax.config import flatten
from tljax.grid import REPEATS, telling
from tljax.report import ranking, text
from tljax.report.ranking import Metric, Setting

NAMES = {
    "optim.lr": "learning rate", "optim.weight_decay": "weight decay", "optim.schedule": "schedule",
    "optim.warmup": "warm-up", "data.limit": "training photographs a class", "train_for": "length",
    "drop_rate": "dropout", "n_train": "training photographs",
}  # fmt: skip
SHORT = {"optim.lr": "lr", "optim.weight_decay": "decay", "label_smoothing": "smoothing"}
MOST_LINES = 8  # values of an axis of numbers that can be lines
CELLS = 16  # values of an axis that a heat map has room for
FIRST = ("strategy", "weights", "model")  # of the fields with texts: what makes lines before all others


class Point(NamedTuple):
    """The setting that is shown at x: of those that differ in other axes the best on val."""

    x: Any
    setting: Setting


class View:
    """A sweep's rows by its axes. `metric` chooses, on val; `told` is the figure of test that is shown beside it."""

    def __init__(self, rows: Sequence[dict], config: ConfigDict):
        self.rows, self.config = list(rows), config
        self.metric, self.told = ranking.by(config.metric), ranking.shown(config.metric)
        self.settings = ranking.settings(self.rows)
        self.ranked = ranking.ranked(self.settings, config.metric)

    @functools.cached_property
    def axes(self) -> dict[str, list]:
        """{name: its values in order} of what tells settings apart, where it has several values."""
        names = [name for axis in flatten(self.config.sweep) for name in telling(axis) if name not in REPEATS]
        found = {}
        for name in names:
            values = [setting.fields[name] for setting in self.settings if name in setting.fields]
            values = list({repr(value): value for value in values}.values())
            if len(values) > 1:
                found[name] = _sorted(name, values)
        return found

    @functools.cached_property
    def numeric(self) -> list[str]:
        """The axes whose values are numbers, learning rates first, then those with the most values."""
        found = [name for name, values in self.axes.items() if numeric(values)]
        return sorted(found, key=lambda name: (name != "optim.lr", -len(self.axes[name])))

    def lines(self, x: str) -> str | None:
        """The axis of which each value is a line over x: text before numbers; None for one line."""
        others = {name: values for name, values in self.axes.items() if name != x}
        place = lambda name: FIRST.index(name) if name in FIRST else len(FIRST)
        labels = set(others) - set(self.config.to_dict()) - {n for n in others if "." in n}
        texts = sorted((n for n in others if not numeric(others[n])), key=lambda n: (n not in labels, place(n)))
        numbers = [n for n in others if numeric(others[n]) and len(others[n]) <= MOST_LINES]
        return next(iter([*texts, *sorted(numbers, key=lambda n: len(others[n]))]), None)

    def best(self, settings: Iterable[Setting]) -> Setting | None:
        """The best of some settings on val; where none has a figure of val, the first."""
        settings = list(settings)
        value = lambda s: ranking.value(s, self.metric)
        worth = lambda s: -math.inf if math.isnan(value(s)) else self.metric.sign * value(s)
        return max(settings, key=worth, default=None)

    def curve(self, x: str, line: str | None, of: Any) -> list[Point]:
        """The points of one line, by x."""
        at = {}
        for setting in self.settings:
            if x in setting.fields and (line is None or setting.fields.get(line) == of):
                at.setdefault(repr(setting.fields[x]), []).append(setting)
        places = [value for value in self.axes[x] if repr(value) in at]
        return [Point(value, self.best(at[repr(value)])) for value in places]

    def groups(self) -> dict[str, Setting]:
        """{a line's name: its best setting}, for the axis that makes the lines."""
        line = self.lines("")
        if line is None or (len(self.axes) == 1 and numeric(self.axes[line])):
            return {"": self.best(self.settings)} if self.settings else {}
        written = self.written(line)
        return {
            written[repr(value)]: self.best(s for s in self.settings if s.fields.get(line) == value)
            for value in self.axes[line]
        }

    def pairs(self) -> list[tuple[str, str]]:
        """The (x, y) of the heat map: the two axes, of several, over which the figure on val varies most."""
        axes, spread = {name: values for name, values in self.axes.items() if len(values) <= CELLS}, {}
        if len(axes) < 2:
            return []
        for name, values in axes.items():
            found = [self.best(s for s in self.settings if s.fields.get(name) == v) for v in values]
            found = [ranking.value(s, self.metric) for s in found if s]
            found = [v for v in found if math.isfinite(v)]
            spread[name] = max(found) - min(found) if found else 0.0
        first, second = sorted(spread, key=lambda name: -spread[name])[:2]
        place = lambda name: self.numeric.index(name) if name in self.numeric else len(self.numeric)
        x, y = sorted((first, second), key=lambda name: (place(name), -len(self.axes[name])))
        return [(x, y)]

    def written(self, name: str) -> dict[str, str]:
        """{repr of a value: how it is written beside a picture}."""
        values = self.axes[name]
        if name == "data.limit":
            return {repr(v): "all" if not v else f"{v}" for v in values}
        return dict(zip(map(repr, values), brief(values)))

    def said(self, setting: Setting) -> str:
        """A setting by its place on the axes that have several values."""
        parts = []
        for name in sorted(self.axes, key=lambda name: name in self.numeric):
            if name in setting.fields:
                value = setting.fields[name]
                said = self.written(name)[repr(value)]
                if name == "data.limit":
                    parts.append(f"{said} a class" if value else "all photographs")
                else:
                    parts.append(said if isinstance(value, str) else f"{SHORT.get(name, named(name))} {said}")
        return ", ".join(parts) or "the one setting"

    def photographs(self, setting: Setting) -> float:
        """The mean number of training photographs of a setting's runs; nan where it is not known."""
        found = [row["n_train"] for row in setting.rows if row.get("n_train")]
        return sum(found) / len(found) if found else math.nan


def named(field: str) -> str:
    """A field or label as it is written beside an axis."""
    return NAMES.get(field, field.rpartition(".")[2].replace("_", " "))


def numeric(values: Sequence) -> dict[str, float] | None:
    """{repr: number} of numbers, or of durations of one unit; None for all others."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return {repr(v): float(v) for v in values}
    found = [re.fullmatch(r"\s*([0-9.]+)\s*(step|epoch|%)s?\s*", v) if isinstance(v, str) else None for v in values]
    if not all(found) or len({match[2] for match in found}) > 1:
        return None
    return {repr(v): float(match[1]) for v, match in zip(values, found)}


def _sorted(name: str, values: list) -> list:
    """Numbers from low to high, where 0 photographs mean all; others as they come."""
    numbers = numeric(values)
    place = lambda v: (name == "data.limit" and not v, numbers[repr(v)])
    return sorted(values, key=place) if numbers else values


def brief(values: Sequence, length: int = 40) -> list[str]:
    """Values as short as they can be and still differ: of calls the keywords that all of them share are left out."""
    calls = [_call(value) if isinstance(value, str) else None for value in values]
    short = []
    for value, call in zip(values, calls):
        if call is None:
            short.append(f"{value:.3g}" if isinstance(value, float) else _cut(str(value) or "none", length))
            continue
        name, arguments = call
        others = [other for other in calls if other and other[1]]
        same = [other for other in others if other[0] == name]
        peers = same if len(same) > 1 else others
        shared = [a for a in arguments if len(peers) > 1 and "=" in a and all(a in other[1] for other in peers)]
        kept = [a for a in arguments if a not in shared]
        short.append(_cut(f"{name}({', '.join(kept)})" if kept else name, length))
    if len(set(short)) == len(values):
        return short
    whole = [_cut(str(value), length) for value in values]
    return whole if len(set(whole)) == len(values) else [f"{i}: {value}" for i, value in enumerate(whole, 1)]


def _call(value: str) -> tuple[str, list[str]] | None:
    """(name, arguments) of a call; a strategy that wraps one other, as frozen_norms(…) does, is left out."""
    try:
        node = ast.parse(value, mode="eval").body
    except SyntaxError:
        return None
    while (
        isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords and isinstance(node.args[0], ast.Call)
    ):
        node = node.args[0]
    if not isinstance(node, ast.Call):
        return None
    return ast.unparse(node.func), [ast.unparse(a) for a in [*node.args, *node.keywords]]


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 1] + "…"


def figure(value: float, metric: Metric, digits: int = 1) -> str:
    """A figure as it is written: `84.6 %`, or `0.512` where it is no share."""
    if value != value:
        return "-"
    return text.number(value) if metric.name in ("nll", "ece") else text.percent(value, digits)
