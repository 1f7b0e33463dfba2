"""Successive halving: the worst of a group stop early (Jamieson & Talwalkar 2016; in rungs, Li et al. 2020).

At each rung all members of a group pause, and the settings with the best config.metric on val go on, packed into fewer
parts of as many slots: the compiled step stays the same. A setting is judged by the mean over its repeats
(`grid.REPEATS`), which stop together. Schedules are those of the whole run, so that who goes on is his solo run.
In a config: `config.halving = "halving(rungs=3, keep=0.5)"`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import memory
from tljax.config import call
from tljax.course import Course, row
from tljax.errors import UserError
from tljax.grid import setting
from tljax.group import Group
from tljax.report import metrics, text
from tljax.step import State


@dataclasses.dataclass(frozen=True)
class Halving:
    """At `rungs` points the best share `keep` of the settings goes on."""

    rungs: int
    keep: float

    def steps(self, total: int) -> tuple[int, ...]:
        """The steps after which members compete: total × keep**rungs, …, total × keep.

        So each stretch between two rungs costs about the same. Raises UserError where they fall together.
        """
        found = tuple(round(total * self.keep**i) for i in range(self.rungs, 0, -1))
        if found[0] < 1 or len({*found, total}) <= len(found):
            raise UserError(f"config.halving: {self.rungs} rungs of {total} steps are after {found}: take fewer rungs")
        return found

    def kept(self, settings: int) -> int:
        """How many of so many settings go on: at least one."""
        return max(1, math.ceil(settings * self.keep - 1e-9))

    def alive(self, settings: int) -> tuple[int, ...]:
        """How many settings there are before the first rung, and after each."""
        found = [settings]
        for _ in range(self.rungs):
            found.append(self.kept(found[-1]))
        return tuple(found)


def halving(rungs: int = 3, keep: float = 0.5) -> Halving:
    """Checks the numbers."""
    if not isinstance(rungs, int) or isinstance(rungs, bool) or rungs < 1:
        raise UserError(f"halving(rungs={rungs!r}): expected a whole number, at least 1")
    if not isinstance(keep, float) or not 0 < keep < 1:
        raise UserError(f"halving(keep={keep!r}): expected a share above 0 and below 1")
    return Halving(rungs, keep)


def parse(given: Any) -> Halving | None:
    """What a config's text calls, None for "". Raises UserError for unknown names and arguments."""
    if not isinstance(given, str):
        raise UserError(f"config.halving = {given!r}: expected a call, as 'halving(rungs=3, keep=0.5)', or ''")
    return call(given, {"halving": halving}, "halving") if given else None


def survivors(figures: Mapping[str, Sequence[float]], count: int, sign: int) -> set[str]:
    """The `count` settings with the best mean figure, the largest for `sign` 1; never one that has not all of them."""
    means = {name: float(np.mean(found)) for name, found in figures.items()}
    finite = [name for name in means if math.isfinite(means[name])]
    return set(sorted(finite, key=lambda name: -sign * means[name])[:count])


# ---- what it costs


def held(group: Group) -> int:
    """Bytes of the states of all its members, which lie on the host while others are trained."""
    own, _ = group.programs.shapes(len(group.courses))
    return memory.nbytes(own) * (2 if group.exp.config.select == "best" else 1)


def stretches(group: Group, halved: Halving) -> list[tuple[int, int]]:
    """(members, steps of each) from one rung to the next, where all settings have as many repeats."""
    count, total = len(group.courses), max(course.total for course in group.courses)
    settings = len({setting(member.fields) for member in group.members})
    stops = (0, *halved.steps(total), total)
    alive = halved.alive(settings)
    return [(-(-count * n // settings), stop - start) for n, start, stop in zip(alive, stops, stops[1:])]


def slots(group: Group, halved: Halving, most: int) -> int:
    """How many slots, at most `most`, cost the least: few stay empty as members fall, many share one forward."""
    if group.how == "map":  # who is over takes no time
        return most
    beside, parts = group.beside, stretches(group, halved)
    cost = lambda size: sum(steps * -(-members // size) * (size + beside) for members, steps in parts)
    return min(range(1, most + 1), key=lambda size: (cost(size), -size))


def told(group: Group, halved: Halving) -> str:
    """The rungs, and the steps of all members together, in one line."""
    total = max(course.total for course in group.courses)
    settings = len({setting(member.fields) for member in group.members})
    steps = sum(members * steps for members, steps in stretches(group, halved))
    rungs = ", ".join(map(str, halved.steps(total)))
    whole = sum(course.total for course in group.courses)
    alive = " → ".join(map(str, halved.alive(settings)))
    return f"rungs after {rungs} steps: {alive} settings, about {steps:,} steps of members instead of {whole:,}"


# ---- the run


@dataclasses.dataclass
class Part:
    """Members that are trained at once, all at one step; their state lies on the host from one rung to the next."""

    courses: list[Course]
    own: State | None = None  # [slots, …]
    best: State | None = None


@dataclasses.dataclass
class Note:
    """What is known of one member so far."""

    setting: str
    steps: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)  # metrics, [steps] of each stretch
    val: dict | None = None
    seconds: float = 0.0
    row: dict = dataclasses.field(default_factory=dict)


def train(group: Group, courses: Sequence[Course], size: int, halved: Halving, say: Callable = print) -> list[dict]:
    """Trains a group's members in parts of so many slots, fewer after each rung. Returns their rows, as `Group.train`.

    Who is eliminated has the figures of that rung. Raises UserError where there is no val split.
    """
    return Competition(group, courses, size, halved, say).run()


class Competition:
    """A group's members on their way through the rungs."""

    def __init__(self, group: Group, courses: Sequence[Course], size: int, halved: Halving, say: Callable):
        if not all(len(course.dataset.val) for course in courses):
            raise UserError(
                f"config.halving needs a val split, config.data.val = {courses[0].member.config.data.val!r}"
            )
        self.group, self.courses, self.size, self.halved, self.say = group, courses, group.whole(size), halved, say
        self.notes = {course.member.number: Note(setting(course.member.fields)) for course in courses}
        self.competing = dict.fromkeys(note.setting for note in self.notes.values())
        self.parts = [Part(list(courses[i : i + size])) for i in range(0, len(courses), size)]
        self.shared: State | None = None
        config = group.exp.config
        self.metric, self.sign = config.metric.removeprefix("val/"), metrics.sign(config.metric)

    def run(self) -> list[dict]:
        """Trains from rung to rung. Returns the members' rows."""
        total, start = max(course.total for course in self.courses), 0
        for stop in (*self.halved.steps(total), total):
            for part in self.parts:
                begun = time.perf_counter()
                self.advance(part, start, stop)
                for course in part.courses:
                    self.notes[course.member.number].seconds += (time.perf_counter() - begun) / len(part.courses)
            if stop < total:
                self.compete(stop)
            start = stop
        found = [self.notes[course.member.number] for course in self.courses]
        return [note.row | {"seconds": round(note.seconds, 3)} | self.group.ways for note in found]

    def advance(self, part: Part, start: int, stop: int) -> None:
        """Trains one part from a step to another, and evaluates it there."""
        group, filled = self.group, self.group.filled(part.courses, self.size)
        if part.own is None:
            part.own, self.shared = group.begin(filled, self.say)
        own, best = self.placed(part.own), self.placed(part.best)
        steps, own, best = group.fit(part.courses, filled, own, self.shared, best, start, stop)
        for k, course in enumerate(part.courses):
            self.notes[course.member.number].steps.append({name: of[:, k] for name, of in steps.items()})
        part.own, part.best = jax.device_get((own, best))
        self.end(part, [course for course in part.courses if course.over], own if best is None else best)
        going = [k for k, course in enumerate(part.courses) if not course.over]
        if going:
            figures = group.figures(part.courses, filled, own, self.shared, "val")
            for k in going:
                self.notes[part.courses[k].member.number].val = figures[k]
            # Whose logits are not finite has diverged there.
            self.end(part, [part.courses[k] for k in going if part.courses[k].over], own)

    def end(self, part: Part, ended: Sequence[Course], own: State) -> None:
        """Writes the rows of those members of a part whose course is over, with the figures that `own` makes."""
        if not ended:
            return
        filled, numbers = self.group.filled(part.courses, self.size), {course.member.number for course in ended}
        found = {name: self.group.figures(part.courses, filled, own, self.shared, name) for name in ("val", "test")}
        for k, course in enumerate(part.courses):
            if course.member.number in numbers:
                note = self.notes[course.member.number]
                steps = {name: np.concatenate([chunk[name] for chunk in note.steps]) for name in note.steps[0]}
                note.row = row(course, steps, {name: found[name][k] for name in found})
                note.val = note.row["val"]

    def placed(self, tree: State | None) -> State | None:
        """A state on the devices, in buffers of its own: the step is given them for good."""
        return jax.device_put(jax.tree.map(jnp.array, tree), self.group.spread.members)

    def compete(self, stop: int) -> None:
        """Ends those that are not among the best, and packs the others."""
        figures: dict[str, list[float]] = {}
        for note in self.notes.values():
            if note.setting in self.competing:
                figures.setdefault(note.setting, []).append(note.val[self.metric] if note.val else math.nan)
        chosen = survivors(figures, self.halved.kept(len(figures)), self.sign)
        for part in self.parts:
            fallen = [c for c in part.courses if not c.over and self.notes[c.member.number].setting not in chosen]
            for course in fallen:
                course.eliminated = True
            self.end(part, fallen, self.placed(part.own))
        self.parts = _packed(self.parts, self.size)
        self.say(f"rung after step {stop}: {len(chosen)} of {text.counted(len(figures), 'setting')} go on")
        self.competing = chosen


def _packed(parts: Sequence[Part], size: int) -> list[Part]:
    """Those that go on, in as few parts as they fill; what is left of the last one holds its last member again."""
    live = [(part, k) for part in parts for k, course in enumerate(part.courses) if not course.over]
    packed = []
    for start in range(0, len(live), size):
        chunk = live[start : start + size]
        padded = chunk + chunk[-1:] * (size - len(chunk))
        own = [jax.tree.map(lambda leaf, k=k: leaf[k], (part.own, part.best)) for part, k in padded]
        packed.append(Part([part.courses[k] for part, k in chunk], *jax.tree.map(lambda *each: np.stack(each), *own)))
    return packed
