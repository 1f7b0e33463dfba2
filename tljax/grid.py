"""A sweep's members: one config for each point of a grid of axes, and which of them one compiled step can train."""

import ast
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tljax import config as configs
from tljax import distributions
from tljax.distributions import DISTRIBUTIONS, Distribution
from tljax.errors import UserError, unknown

# What a step takes as numbers: members that differ in these alone share a compiled step, whatever they train on.
NUMBERS = (
    "optim.lr", "optim.weight_decay", "optim.schedule", "optim.warmup", "label_smoothing", "drop_rate", "train_for"
)  # fmt: skip
# What makes another stream of the same photographs: shared only where their features are kept.
STREAMS = ("seed", "data.limit", "data.val", "data.fold_seed")
REPEATS = ("seed", "data.val", "data.fold_seed")  # runs that differ in these alone repeat one experiment

OF_A_SWEEP = ("sweep", "search", "halving")  # what its config has, and that of a member has not


class Member(NamedTuple):
    """One run of a sweep: its number in the grid, its place on each axis, and its whole config."""

    number: int
    fields: dict[str, Any]  # {field or label of an axis: value}
    config: ConfigDict

    def key(self, free: Iterable[str]) -> str:
        """A text that is equal for members that differ in the fields `free` alone."""
        return json.dumps({k: v for k, v in configs.flatten(self.config).items() if k not in free}, sort_keys=True)


class Space(NamedTuple):
    """What a sweep's members have in common, and what each axis can be."""

    base: ConfigDict
    axes: dict[str, tuple | Distribution]

    @property
    def searched(self) -> dict[str, tuple | Distribution]:
        """The axes that make another experiment, and not another run of the same."""
        return {axis: values for axis, values in self.axes.items() if not set(names(axis)) <= set(REPEATS)}

    @property
    def repeats(self) -> list[dict[str, Any]]:
        """The combinations of the other axes."""
        axes = {axis: values for axis, values in self.axes.items() if axis not in self.searched}
        return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]

    def member(self, number: int, point: Mapping[str, Any]) -> Member:
        """The member at a point, {axis: value}. Raises UserError for a value that does not fit."""
        return _member(number, self.base, {axis: point[axis] for axis in self.axes})

    def config(self, fields: Mapping[str, Any]) -> ConfigDict:
        """The config of the member of which a row tells these fields."""
        tuples = lambda value: tuple(map(tuples, value)) if isinstance(value, list) else value  # of JSON
        known = configs.flatten(self.base)
        return _member(0, self.base, {field: tuples(value) for field, value in fields.items() if field in known}).config

    def repeated(self, number: int, setting: Mapping[str, Any]) -> tuple[Member, ...]:
        """The members that repeat the setting with this number, {searched axis: value}, as often as all others."""
        repeats = self.repeats
        return tuple(self.member(number * len(repeats) + i, {**setting, **more}) for i, more in enumerate(repeats))


def axes(values: Mapping[str, Sequence | Distribution | str]) -> ConfigDict:
    """`config.sweep` from {dotted field: values}, as `axes({"optim.lr": (1e-3, 1e-2), "seed": range(3)})`.

    An axis over several fields at once names them all, and its values are tuples: `{"strategy, optim.lr": (("frozen()",
    0.01), ("full()", 1e-3))}`. A name that begins with `#` is no field: it labels the axis' values for those who read.
    It is nested as the config is, so that `--config.sweep.optim.lr="(1e-3,)"` changes it. For a search an axis can be a
    distribution, or its text: `axes({"optim.lr": loguniform(1e-4, 1e-1)})`.
    """
    nested: dict = {}
    for field, given in values.items():
        *groups, name = field.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        given = str(given) if isinstance(given, Distribution) else given
        place[name] = tuple(given) if isinstance(given, range | list) else given
    return ConfigDict(nested)


def names(axis: str) -> tuple[str, ...]:
    """The fields that an axis sets at once, and its labels: `("#recipe", "strategy", "optim.lr")`; mostly one field."""
    return tuple(name.strip() for name in axis.split(","))


def telling(axis: str) -> tuple[str, ...]:
    """The names by which an axis' values are told apart: its labels, without their `#`, else its fields."""
    labels = tuple(name[1:] for name in names(axis) if name.startswith("#"))
    return labels or names(axis)


def told(sweep: ConfigDict) -> list[str]:
    """Each axis with its number of values, or what it is drawn from: `8 × optim.lr`."""
    say = lambda name, given: f"{name} from {given}" if isinstance(given, str) else f"{len(given)} × {name}"
    return [say(" & ".join(telling(axis)), _given(values)) for axis, values in configs.flatten(sweep).items()]


def _given(given: Any) -> Any:
    """An axis as it was meant: a command line can only make tuples of tuples, and texts of texts."""
    if isinstance(given, tuple) and len(given) == 1 and isinstance(given[0], str):
        return given[0] if given[0].partition("(")[0] in DISTRIBUTIONS else given
    if isinstance(given, str) and given.startswith("("):
        try:
            return ast.literal_eval(given)
        except (ValueError, SyntaxError):
            return given
    return given


def space(config: ConfigDict) -> Space:
    """The axes of `config.sweep`, over the other fields of the config.

    Raises UserError: no axis, an axis that is no field, without values or with one twice, a distribution of numbers
    that the field cannot be.
    """
    given = config.get("sweep", None)
    if not isinstance(given, ConfigDict):
        raise UserError("the config has no sweep: set config.sweep = axes({field: values}), from tljax.grid")
    base = ConfigDict({name: value for name, value in config.to_dict().items() if name not in OF_A_SWEEP})
    configs.check(base)
    known, found = configs.flatten(base), configs.flatten(given)
    if not found:
        raise UserError("config.sweep is empty: give it an axis, as axes({'optim.lr': (1e-3, 1e-2)})")
    for axis, values in found.items():
        found[axis] = _values(axis, values, known)
    several = [name.removeprefix("#") for axis in found for name in names(axis)]
    for name in several:
        if several.count(name) > 1:
            raise UserError(f"config.sweep has two axes over {name}")
    return Space(base, found)


def members(config: ConfigDict) -> tuple[Member, ...]:
    """Every combination of the values in `config.sweep`, the last axis varying fastest.

    Raises UserError as `space` does, and for a distribution.
    """
    found = space(config)
    for field, values in found.axes.items():
        if isinstance(values, Distribution):
            raise UserError(f"axis {field} = '{values}': to draw from it, set config.search, as 'random(64)'")
    combinations = itertools.product(*found.axes.values())
    return tuple(_member(i, found.base, dict(zip(found.axes, values))) for i, values in enumerate(combinations))


def _values(axis: str, given: Any, known: dict[str, Any]) -> tuple | Distribution:
    """The values of an axis. Raises UserError."""
    fields = names(axis)
    for field in fields:
        if field not in known and not field.startswith("#"):
            raise unknown("axis", field, known)
        if field.startswith("#") and (field[1:] in known or field == "#"):
            raise UserError(f"axis {axis}: the label {field!r} needs a name that is no field's")
    if all(field.startswith("#") for field in fields):
        raise UserError(f"axis {axis} has labels alone: name the fields that it sets")
    like = tuple(known.get(field, "label") for field in fields)
    expected = f"expected a tuple of values, as {like if len(like) < 2 else (like,)!r}"
    given = _given(given)
    if isinstance(given, str) and len(fields) == 1 and not isinstance(like[0], str):
        found = distributions.parse(given)
        if axis in REPEATS:
            raise UserError(f"axis {axis} = {given!r}: runs that differ in it repeat one setting; give it values")
        if not distributions.fits(found, like[0]):
            raise UserError(f"axis {axis} = {given!r}: draws no {type(like[0]).__name__}, as {like[0]!r}")
        return found
    if not isinstance(given, tuple | list) or not given:
        raise UserError(f"axis {axis} = {given!r}: {expected}")
    for value in given if len(fields) > 1 else ():
        if not isinstance(value, tuple | list) or len(value) != len(fields):
            raise UserError(f"axis {axis}: {value!r} is no tuple of {len(fields)} values")
    twice = [value for i, value in enumerate(given) if value in given[:i]]
    if twice:
        raise UserError(f"axis {axis} has {twice[0]!r} twice")
    return tuple(given)


def _member(number: int, base: ConfigDict, point: dict[str, Any]) -> Member:
    whole, fields = base.to_dict(), {}
    for axis, value in point.items():
        fields |= dict(zip(names(axis), value)) if "," in axis else {axis: value}
    labels = {name[1:]: fields.pop(name) for name in list(fields) if name.startswith("#")}
    for field, value in fields.items():
        *groups, name = field.split(".")
        place = whole
        for group in groups:
            place = place[group]
        if isinstance(place[name], float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        place[name] = fields[field] = value
    config = ConfigDict(whole)
    try:
        configs.check(config)
    except UserError as error:
        raise UserError(f"config.sweep: {error}") from None
    return Member(number, labels | fields, config)


def setting(fields: Mapping[str, Any]) -> str:
    """A text that is equal for the members, of whom `fields` are told, that repeat one setting."""
    return json.dumps({field: value for field, value in fields.items() if field not in REPEATS})


def grouped(found: Iterable[Member], free: Iterable[str]) -> list[tuple[Member, ...]]:
    """Members that differ in the fields `free` alone, together; groups and members in the order of the grid."""
    groups: dict[str, list[Member]] = {}
    free = tuple(free)
    for member in found:
        groups.setdefault(member.key(free), []).append(member)
    return list(map(tuple, groups.values()))
