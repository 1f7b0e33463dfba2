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
NUMBERS = ("optim.lr", "optim.weight_decay", "optim.schedule", "optim.warmup", "label_smoothing", "train_for")
# What makes another stream of the same photographs: shared only where their features are kept.
STREAMS = ("seed", "data.limit", "data.val", "data.fold_seed")
REPEATS = ("seed", "data.val", "data.fold_seed")  # runs that differ in these alone repeat one experiment

OF_A_SWEEP = ("sweep", "search", "halving")  # what its config has, and that of a member has not


class Member(NamedTuple):
    """One run of a sweep: its number in the grid, its place on each axis, and its whole config."""

    number: int
    fields: dict[str, Any]  # {axis: value}
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
        return {field: values for field, values in self.axes.items() if field not in REPEATS}

    @property
    def repeats(self) -> list[dict[str, Any]]:
        """The combinations of the other axes."""
        axes = {field: values for field, values in self.axes.items() if field in REPEATS}
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
    for field, values in found.items():
        if field not in known:
            raise unknown("axis", field, known)
        found[field] = values = _values(field, values, known[field])
        if isinstance(values, Distribution):
            continue
        twice = [value for i, value in enumerate(values) if value in values[:i]]
        if twice:
            raise UserError(f"axis {field} has {twice[0]!r} twice")
    return Space(base, found)


def _values(field: str, given: Any, like: Any) -> tuple | Distribution:
    """An axis as it is meant: a command line can only make tuples of tuples, and texts of texts."""
    if isinstance(given, tuple) and len(given) == 1 and isinstance(given[0], str) and not isinstance(like, str):
        given = given[0] if given[0].partition("(")[0] in DISTRIBUTIONS else given
    if isinstance(given, str) and given.startswith("("):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            raise UserError(f"axis {field} = {given!r}: expected a tuple of values, as ({like!r},)") from None
    if isinstance(given, str) and not isinstance(like, str):
        found = distributions.parse(given)
        if field in REPEATS:
            raise UserError(f"axis {field} = {given!r}: runs that differ in it repeat one setting; give it values")
        if not distributions.fits(found, like):
            raise UserError(f"axis {field} = {given!r}: draws no {type(like).__name__}, as {like!r}")
        return found
    if not isinstance(given, tuple | list) or not given:
        raise UserError(f"axis {field} = {given!r}: expected a tuple of values, as ({like!r},)")
    return tuple(given)


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


def _member(number: int, base: ConfigDict, fields: dict[str, Any]) -> Member:
    whole = base.to_dict()
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
    return Member(number, fields, config)


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
