"""Trains every point of a grid: `python -m tljax.sweep --config=configs/sweeps/seeds.py --workdir=DIR`.

Members that differ in numbers, seeds and subsets of the data alone are one group: one compiled step trains all of them
at once (`tljax.members`). Every other axis makes groups. A group, or a part of one, is a unit of work: whoever runs the
same command on the same folder takes the next that nobody has (`tljax.folder`).
"""

from tljax import claims, cluster, command

SHARE = 0.8  # of the free memory, that a group may take
USAGE = {
    "description": __doc__,
    "workdir": "the sweep's folder (default: runs/NAME-DIGEST); an interrupted sweep goes on there",
    "memory": f"bytes of a device that a group may take, as '4 GB' (default: {SHARE:.0%} of what is free)",
    "how": "vmap (members at once), map (in turn in one step), sequence (one run after another) or auto, the fastest",
    "launch": "start workers: local(4), slurm(nodes=4, partition='gpu') or ray(4), see docs/sweeps.md",
    "workers": "divide groups for so many workers (default: as many as were started together, else 1)",
    "wait": "for units that others are at: yes (the default; takes over from who dies) or no",
    "stale": f"seconds without a heartbeat, after which a worker counts as dead (default: {claims.STALE:g})",
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

import bisect
import contextlib
import functools
import re
import time
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from tljax import alike, data, experiment, grid, halving, members, memory, search, workers
from tljax import config as configs
from tljax.claims import Claim
from tljax.distributions import Distribution
from tljax.errors import UserError, listing, unknown
from tljax.folder import Folder, Unit, share
from tljax.grid import Member
from tljax.group import Group
from tljax.report import sweep_page, sweep_table, text
from tljax.report.console import Console, quiet_libraries


def main(argv: list[str]) -> int:
    """Trains every combination of a sweep's values, many in one compiled step, and leaves a table of their figures."""
    flags = command.from_command_line(argv, **USAGE)
    path = flags.workdir or f"runs/{flags.config.name}-{configs.digest(flags.config)}"
    count = int(_number("workers", flags.workers or "1", "a number of workers", r"[1-9]\d*"))
    folder = Folder(path, _number("stale", flags.stale or str(claims.STALE), "seconds", r"\d*[1-9]\d*(\.\d*)?"))
    if (flags.how or "auto") not in members.HOW:
        raise unknown("--how", flags.how, members.HOW)
    if (flags.wait or "yes") not in ("yes", "no"):
        raise unknown("--wait", flags.wait, ("yes", "no"))
    limit = configs.nbytes(flags.memory, "memory") if flags.memory else None
    if flags.launch:
        cluster.alone("tljax.sweep --launch")
        sweep = Sweep(flags.config, folder, Console(), flags.how or "auto", limit or 0)
        return workers.launch(flags.launch, sweep, argv, SHARE)
    workers.end_with_parent()
    quiet_libraries()
    place = cluster.worker()
    if place is not None and not flags.workers:
        count = place.count
    limit = limit or int(SHARE * memory.free() / (place.beside if place else 1))
    return Sweep(flags.config, folder, Console(), flags.how or "auto", limit, count, flags.wait != "no").run()


def _number(flag: str, value: str, expected: str, pattern: str) -> float:
    if not re.fullmatch(pattern, value):
        raise UserError(f"--{flag} = {value!r}: expected {expected}")
    return float(value)


class Sweep:
    """A sweep from its plan to its tables; `limit` is in bytes of a device.

    Groups are divided so that so many `workers` have something to do. With `wait` it is over when all members have a
    result, else when every unit is done or another worker's.
    """

    def __init__(
        self, config: ConfigDict, folder: Folder, console: Console, how: str, limit: int, workers: int = 1,
        wait: bool = True,
    ):  # fmt: skip
        self.config, self.folder, self.console, self.how, self.limit = config, folder, console, how, limit
        self.workers, self.wait, self.page = workers, wait, sweep_page.Page(folder, config)
        self.search, self.halving = search.of(config), halving.parse(config.get("halving", ""))
        self.members = self.search.members(config)  # those of a study: what can be wrong with its members
        self.built: dict[int, Group] = {}  # of the plan
        self.mine = -1  # the group whose step is compiled
        for member in self.members:
            _check(member.config)
        self.made: dict[str, Group] = {}  # by what makes a group, for the generations to come
        self.peaks: dict[str, dict[str, int]] = {}  # by what makes a step: a step is traced once for its memory

    def run(self) -> int:
        """Trains the members that have no result yet. Returns 0."""
        begun = time.perf_counter()
        if self.folder.begun:
            self.folder.claim(self.config)
        done = self.folder.results()
        already = f"; {len(done)} are done" if done else ""
        axes = ", ".join(grid.told(self.config.sweep))
        self.console.print(f"{self.told_search()}{axes}{already}")
        with contextlib.closing(self.search.generations(self.config, self.folder, self.console.print)) as generations:
            for self.members in generations:
                self.train(self.members)
        best = self.tables(last=True)
        seconds = text.duration(time.perf_counter() - begun)
        missing = self.search.count(self.config) - len(self.folder.results())
        others = f"; {text.counted(missing, 'member')} with other workers" if missing else ""
        self.console.print(f"{best}; {seconds} in all{others}; everything is in {self.folder.path}")
        return 0

    # ---- units of work

    def train(self, found: Sequence[Member]) -> None:
        """Trains some members with whoever else works in the folder, and leaves their results there."""
        known = {member.number: member for member in found}
        units = self.folder.planned(list(known), lambda: self.plan(found))
        share(self.folder, units, lambda *held: self.unit(*held, units, known), self.console.print, self.wait)
        self.built, self.mine = {}, -1

    def unit(self, unit: Unit, claim: Claim, units: Sequence[Unit], known: Mapping[int, Member]) -> None:
        """Trains a unit's members, and leaves its result."""

        def say(line: str) -> None:
            self.console.print(line)
            self.folder.log(unit, line)

        parts = [other for other in units if other.group == unit.group]
        if self.mine != unit.group:
            self.built.pop(self.mine, None)  # what it holds goes with it
            self.mine = unit.group
        group = self.built.get(unit.group)
        if group is None:
            found = [known[number] for part in parts for number in part.numbers]
            group = self.group(found, unit.kept)
            say(f"group {unit.group + 1} of {units[-1].group + 1}: {self.told(group, parts)}")
            self.built[unit.group] = group
        rows, size = [], self.part(group, max(len(part.numbers) for part in parts))
        anew = {course.member.number: course.anew() for course in group.courses}
        courses = [anew[number] for number in unit.numbers]
        if self.halving:
            rows = halving.train(group, courses, size, self.halving, say)
        else:
            for start in range(0, len(courses), size):
                rows += group.train(courses[start : start + size], size, say=say)[0]
        if claim.lost or not self.folder.keep(unit, rows):
            return say(f"group {unit.group + 1}: another worker has taken unit {unit.name} over, which stays its own")
        self.tables()
        seconds = text.duration(sum(row["seconds"] for row in rows))
        say(f"group {unit.group + 1}: {text.counted(len(rows), 'member')} in {seconds}, {_outcome(rows)}")

    def told_search(self) -> str:
        """How many members there are, and how they are chosen."""
        count = text.counted(self.search.count(self.config), "member")
        return f"{self.config.search}, {count}: " if self.config.get("search", "") else f"{count}: "

    @functools.cached_property
    def dataset(self):
        """The data set of a member, read once for all that have the same."""
        load = functools.cache(lambda fields: data.load(configs.from_json(fields)))
        return lambda member: load(configs.to_json(member.config.data))

    # ---- the plan

    def plan(self, found: Sequence[Member]) -> list[list[Unit]]:
        """The units of each group of members: parts that fit into memory, and something for every worker."""
        groups = self.groups(found)
        self.built, planned = dict(enumerate(groups)), []
        for i, group in enumerate(groups):
            count = len(group.members)
            share = -(-self.workers * count // len(found))
            size = count if self.halving else min(self.part(group, count), -(-count // share))  # they compete
            numbers = [member.number for member in group.members]
            planned.append([Unit(i, group.kept, tuple(numbers[j : j + size])) for j in range(0, count, size)])
            self.console.print(f"group {i + 1} of {len(groups)}: {self.told(group, planned[-1])}")
        self.folder.claim(self.config)  # now that all of it is known to make sense
        return planned

    def groups(self, members: Sequence[Member]) -> list[Group]:
        """The groups of some members."""
        found = []
        for wide in alike.wide(members, self.dataset):
            datasets = [self.dataset(member) for member in wide]
            config = wide[0].config
            exp = experiment.build(config, datasets[0].classes)
            kept, said = alike.keep(exp, datasets)
            free = (*grid.NUMBERS, "strategy", *(grid.STREAMS if kept else ()))
            if alike.draws_frozen(exp):
                free = tuple(field for field in free if field != "seed")
            self.console.print(f"feature cache: {said}")
            for part in grid.grouped(wide, free):
                found.append(self.group(part, kept))
        return found

    def group(self, found: Sequence[Member], kept: str) -> Group:
        """The group of some members; it goes on with what that of an earlier generation has compiled and computed."""
        made = Group(found, [self.dataset(member) for member in found], self.how, kept)
        key = found[0].key((*grid.NUMBERS, *grid.STREAMS, "strategy")) + made.phase.plan.kind
        made.peaks = self.peaks.setdefault(f"{key} {made.facts()}", made.peaks)
        if self.search.again:
            made.adopt(self.made.get(key))
            self.made[key] = made
        return made

    def need(self, group: Group, size: int) -> int:
        """Bytes that a group takes at most, so many of its members at once."""
        return group.need(size) + (halving.held(group) if self.halving else 0)

    def part(self, group: Group, count: int) -> int:
        """How many of so many members of a group are trained at once. Raises UserError where not even one fits."""
        if group.slots:  # compiled
            return group.slots
        one = self.need(group, 1)
        if one > self.limit:
            raise UserError(
                f"one member of the group {self.name(group)} needs {text.size(one)}, more than the "
                f"{text.size(self.limit)} of --memory; try a smaller config.batch_size or config.cache_views"
            )
        if group.how == "sequence":
            return 1
        fits = count
        if self.need(group, count) > self.limit:
            need = functools.partial(self.need, group)
            fits = bisect.bisect_right(range(1, count), self.limit, key=need)  # it grows with the number
        if self.halving:
            return halving.slots(group, self.halving, fits)
        chunks = -(-count // fits)
        return -(-count // chunks)

    def name(self, group: Group) -> str:
        """What all members of a group have in common of the axes that make groups."""
        first = group.members[0].fields
        common = [f for f, v in first.items() if all(member.fields[f] == v for member in group.members)]
        axes = grid.space(self.config).axes.items()
        lone = [axis for axis, values in axes if not isinstance(values, Distribution) and len(values) == 1]
        several = [name for axis, _ in axes if axis not in lone for name in grid.telling(axis)]
        return ", ".join(f"{field} = {first[field]!r}" for field in common if field in several) or self.config.name

    def told(self, group: Group, parts: Sequence[Unit]) -> str:
        """A group, and the units that it is parted into, in one line."""
        devices, size = len(group.spread.devices), self.part(group, max(len(part.numbers) for part in parts))
        number = len(parts) if not self.halving else -(-len(group.members) // size)
        way = {"vmap": "at once", "map": "in turn", "sequence": "one run after another"}[group.how]
        return (
            f"{self.name(group)}: {text.counted(len(group.members), 'member')}"
            + (f" in {number} parts of {size}" if number > 1 and size > 1 else "")
            + (f" over {devices} devices" if devices > 1 else "")
            + f", 1 compiled step ({group.how}: {way}), at most {text.size(self.need(group, size))} of "
            f"{text.size(self.limit)}, {max(course.total for course in group.courses):,} steps"
            + (f"; {halving.told(group, self.halving)}" if self.halving else "")
        )

    # ---- the end

    def tables(self, last: bool = False) -> str:
        """Writes the tables of what there is so far, the best config and the page. Returns a line about the best."""
        space = grid.space(self.config)
        config_of = lambda row: space.config(row["fields"])
        while True:
            finished, rows = self.folder.finished(), self.folder.results()
            sweep_table.write(self.folder, rows)
            best = sweep_table.best(self.folder, rows, self.config.metric, config_of)
            if self.folder.finished() == finished:  # else another worker may have written a longer table meanwhile
                break
        self.page.write(rows, self.search.count(self.config), last)
        return best


def _check(config: ConfigDict) -> None:
    """Raises UserError for what a sweep cannot do."""
    if config.phases:
        raise UserError(f"config.phases = {config.phases!r}: a sweep has one phase; give config.strategy")
    if config.source.data:
        raise UserError(f"config.source.data = {config.source.data!r}: a sweep does not measure forgetting")
    for field in ("profile", "wandb"):
        if config[field]:
            raise UserError(f"config.{field} = {config[field]!r} is for single runs, not for a sweep")


def _outcome(rows: list[dict]) -> str:
    """How many ended how."""
    ends = [row["status"].split(" at ")[0] for row in rows]
    return listing(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))


if __name__ == "__main__":
    command.run(main)
