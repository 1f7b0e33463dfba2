"""A sweep's members: one config for each point of a grid of axes, and which of them one compiled step can train."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tljax import config as configs
from tljax.errors import UserError, unknown

# What a step takes as numbers: members that differ in these alone share a compiled step, whatever they train on.
NUMBERS = (
    "optim.lr", "optim.weight_decay", "optim.schedule", "optim.warmup", "label_smoothing", "drop_rate", "train_for"
)  # fmt: skip
# What makes another stream of the same photographs: shared only where their features are kept.
STREAMS = ("seed", "data.limit", "data.val", "data.fold_seed")
REPEATS = ("seed", "data.val", "data.fold_seed")  # runs that differ in these alone repeat one experiment


class Member(NamedTuple):
    """One run of a sweep: its number in the grid, its place on each axis, and its whole config."""

    number: int
    fields: dict[str, Any]  # {field or label of an axis: value}
    config: ConfigDict

    def key(self, free: Iterable[str]) -> str:
        """A text that is equal for members that differ in the fields `free` alone."""
        return json.dumps({k: v for k, v in configs.flatten(self.config).items() if k not in free}, sort_keys=True)


def axes(values: Mapping[str, Sequence]) -> ConfigDict:
    """`config.sweep` from {dotted field: values}, as `axes({"optim.lr": (1e-3, 1e-2), "seed": range(3)})`.

    An axis over several fields at once names them all, and its values are tuples: `{"strategy, optim.lr": (("frozen()",
    0.01), ("full()", 1e-3))}`. A name that begins with `#` is no field: it labels the axis' values for those who read.
    It is nested as the config is, so that `--config.sweep.optim.lr="(1e-3,)"` changes it.
    """
    nested: dict = {}
    for field, given in values.items():
        *groups, name = field.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
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
    """Each axis with its number of values: `8 × optim.lr`."""
    return [f"{len(values)} × {' & '.join(telling(axis))}" for axis, values in configs.flatten(sweep).items()]


def members(config: ConfigDict) -> tuple[Member, ...]:
    """Every combination of the values in `config.sweep`, the last axis varying fastest.

    Raises UserError: no axis, an axis that is no field, without values or with one twice, a value that does not fit.
    """
    given = config.get("sweep", None)
    if not isinstance(given, ConfigDict):
        raise UserError("the config has no sweep: set config.sweep = axes({field: values}), from tljax.grid")
    base = ConfigDict({name: value for name, value in config.to_dict().items() if name != "sweep"})
    configs.check(base)
    known, found = configs.flatten(base), configs.flatten(given)
    if not found:
        raise UserError("config.sweep is empty: give it an axis, as axes({'optim.lr': (1e-3, 1e-2)})")
    for axis, values in found.items():
        _check(axis, values, known)
    several = [name.removeprefix("#") for axis in found for name in names(axis)]
    for name in several:
        if several.count(name) > 1:
            raise UserError(f"config.sweep has two axes over {name}")
    combinations = itertools.product(*found.values())
    return tuple(_member(i, base, dict(zip(found, values))) for i, values in enumerate(combinations))


def _check(axis: str, values: Any, known: dict[str, Any]) -> None:
    fields = names(axis)
    for field in fields:
        if field not in known and not field.startswith("#"):
            raise unknown("axis", field, known)
        if field.startswith("#") and (field[1:] in known or field == "#"):
            raise UserError(f"axis {axis}: the label {field!r} needs a name that is no field's")
    if all(field.startswith("#") for field in fields):
        raise UserError(f"axis {axis} has labels alone: name the fields that it sets")
    if not isinstance(values, tuple | list) or not values:
        like = tuple(known.get(field, "label") for field in fields)
        like = like if len(like) < 2 else (like,)
        raise UserError(f"axis {axis} = {values!r}: expected a tuple of values, as {like!r}")
    for value in values if len(fields) > 1 else ():
        if not isinstance(value, tuple | list) or len(value) != len(fields):
            raise UserError(f"axis {axis}: {value!r} is no tuple of {len(fields)} values")
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise UserError(f"axis {axis} has {twice[0]!r} twice")


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


def grouped(found: Iterable[Member], free: Iterable[str]) -> list[tuple[Member, ...]]:
    """Members that differ in the fields `free` alone, together; groups and members in the order of the grid."""
    groups: dict[str, list[Member]] = {}
    free = tuple(free)
    for member in found:
        groups.setdefault(member.key(free), []).append(member)
    return list(map(tuple, groups.values()))
