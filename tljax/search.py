"""Which members a sweep trains: every point of a grid, some that are drawn, or those that earlier ones suggest.

In a config a search is written as a call: `config.search = "random(64, seed=0)"`. What is searched are settings: each
is trained with every combination of the axes that repeat it (`grid.REPEATS`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from tljax import config as configs
from tljax import grid
from tljax.distributions import Distribution
from tljax.errors import UserError, unknown
from tljax.grid import Member, Space

if TYPE_CHECKING:
    from tljax.sweep import Folder

SAMPLERS = ("tpe", "random", "qmc")


class Search(Protocol):
    """What `config.search` calls; `again`: whether later generations can go on with the groups of earlier ones."""

    again: bool

    def members(self, config: ConfigDict) -> tuple[Member, ...]:
        """Members that show what can be wrong with a sweep's config: all that are known before any is trained."""

    def count(self, config: ConfigDict) -> int:
        """How many members there are, or will be."""

    def generations(self, config: ConfigDict, folder: "Folder", say: Callable) -> Iterator[tuple[Member, ...]]:
        """The members to train, some at a time; when the next are asked for, these have their rows in the folder."""


class _AtOnce:
    """A search whose members are known before any is trained."""

    again = False

    def generations(self, config: ConfigDict, folder: "Folder", say: Callable) -> Iterator[tuple[Member, ...]]:
        """All, as one generation."""
        yield self.members(config)


class _Settings:
    """A search of so many settings."""

    n: int

    def count(self, config: ConfigDict) -> int:
        """How many members there will be."""
        return self.n * len(grid.space(config).repeats)


@dataclasses.dataclass(frozen=True)
class Grid(_AtOnce):
    """Every combination of the axes' values."""

    def count(self, config: ConfigDict) -> int:
        """How many there are."""
        return math.prod(map(len, grid.space(config).axes.values()))

    def members(self, config: ConfigDict) -> tuple[Member, ...]:
        """All, as `grid.members`."""
        return grid.members(config)


@dataclasses.dataclass(frozen=True)
class Random(_Settings, _AtOnce):
    """`n` settings, none twice, each axis drawn for itself (Bergstra & Bengio 2012). More begin with the same."""

    n: int
    seed: int = 0

    def __post_init__(self):
        _at_least("random", 1, n=self.n)
        _at_least("random", 0, seed=self.seed)

    def members(self, config: ConfigDict) -> tuple[Member, ...]:
        """All. Raises UserError where there are fewer settings than n."""
        space = checked(config)
        there = size(space)
        if there < self.n:
            raise UserError(f"config.search = {config.search!r}: there are {there} settings; leave it away for all")
        rng, settings = np.random.default_rng(self.seed), {}
        while len(settings) < self.n:
            drawn = {field: _drawn(values, rng.random()) for field, values in space.searched.items()}
            settings.setdefault(grid.setting(drawn), drawn)
        return tuple(m for i, drawn in enumerate(settings.values()) for m in space.repeated(i, drawn))


@dataclasses.dataclass(frozen=True)
class Optuna(_Settings):
    """`n` settings in generations, each suggested by the figures of those before (Akiba et al. 2019).

    Several machines share one study through its `storage`, a URL as sqlite:///FILE or postgresql://…, by default a file
    in the sweep's folder. Each tells it every `heartbeat` seconds that it lives; the trials of one that has been silent
    for twice as long are trained by another. `study` is its name there.
    """

    n: int
    generation: int = 16
    sampler: str = "tpe"
    seed: int = 0
    storage: str = ""
    study: str = ""
    heartbeat: int = 60

    again = True

    def __post_init__(self):
        _at_least("optuna", 1, n=self.n, generation=self.generation, heartbeat=self.heartbeat)
        _at_least("optuna", 0, seed=self.seed)
        if self.sampler not in SAMPLERS:
            raise unknown("sampler", self.sampler, SAMPLERS)
        for name in ("storage", "study"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"search optuna({name}={getattr(self, name)!r}): expected a text")

    def members(self, config: ConfigDict) -> tuple[Member, ...]:
        """The ends of every axis: what a trial asks for lies between."""
        return ends(checked(config))

    def generations(self, config: ConfigDict, folder: "Folder", say: Callable) -> Iterator[tuple[Member, ...]]:
        """What a study asks for (`tljax.study`)."""
        from tljax import study

        return study.generations(self, config, folder, say)


SEARCHES = {"grid": Grid, "random": Random, "optuna": Optuna}


def of(config: ConfigDict) -> Search:
    """The search that a sweep's config calls. Raises UserError for unknown names and arguments."""
    text = config.get("search", "")
    if not isinstance(text, str):
        raise UserError(f"config.search = {text!r}: expected a call, as 'random(64)', or '' for the whole grid")
    return configs.call(text or "grid()", SEARCHES, "search")


def checked(config: ConfigDict) -> Space:
    """The space of a search. Raises UserError where there is nothing to search, or an end of an axis does not fit."""
    space = grid.space(config)
    if not space.searched:
        raise UserError(f"config.search = {config.search!r}: no axis to search, {', '.join(space.axes)} only repeat")
    ends(space)
    return space


def ends(space: Space) -> tuple[Member, ...]:
    """Members that hold every value of every axis, and both ends of every distribution."""
    axes = {
        field: (values.at(0.0), values.at(1.0)) if isinstance(values, Distribution) else values
        for field, values in space.axes.items()
    }
    first = {field: values[0] for field, values in axes.items()}
    points = [first, *({**first, field: value} for field, values in axes.items() for value in values[1:])]
    return tuple(space.member(i, point) for i, point in enumerate(points))


def size(space: Space) -> float:
    """How many settings there are."""
    count = lambda v: (v.high - v.low + 1 if v.whole else math.inf) if isinstance(v, Distribution) else len(v)
    return math.prod(map(count, space.searched.values()))


def _drawn(values: tuple | Distribution, share: float) -> Any:
    return values.at(share) if isinstance(values, Distribution) else values[int(share * len(values))]


def _at_least(name: str, least: int, **given: int) -> None:
    for field, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"search {name}({field}={value!r}): expected a whole number, at least {least}")
