"""Trains every point of a grid: `python -m tljax.sweep --config=configs/sweeps/seeds.py --workdir=DIR`.

Members that differ in numbers, seeds and subsets of the data alone are one group: one compiled step trains all of them
at once (`tljax.members`). Every other axis makes groups.
"""

import bisect
import contextlib
import copy
import dataclasses
import functools
import json
import time
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from tljax import cache, command, data, experiment, grid, halving, members, memory, parallel, search
from tljax import config as configs
from tljax.distributions import Distribution
from tljax.errors import UserError, listing, unknown
from tljax.experiment import Experiment
from tljax.grid import Member
from tljax.group import Group, pools
from tljax.patterns import matches
from tljax.report import sweep_table, text
from tljax.report.console import Console, quiet_libraries
from tljax.workdir import Workdir

SHARE = 0.8  # of the free memory, that a group may take


def main(argv: list[str]) -> int:
    """Trains every combination of a sweep's values, many in one compiled step, and leaves a table of their figures."""
    flags = command.from_command_line(
        argv,
        main.__doc__,
        workdir="the sweep's folder (default: runs/NAME-DIGEST); an interrupted sweep goes on there",
        memory=f"bytes that a group may take, as '4 GB' (default: {SHARE:.0%} of what is free)",
        how="members at once (vmap), one by one in one program (map), or whichever is faster (auto, the default)",
    )
    quiet_libraries()
    parallel.start()
    if jax.process_count() > 1:
        raise UserError("a sweep runs in one process: divide the grid, and give each part a --workdir of its own")
    how = flags.how or "auto"
    if how not in members.HOW:
        raise unknown("--how", how, members.HOW)
    limit = configs.nbytes(flags.memory, "memory") if flags.memory else int(SHARE * memory.free())
    path = flags.workdir or f"runs/{flags.config.name}-{configs.digest(flags.config)}"
    return Sweep(flags.config, Folder(path), Console(), how, limit).run()


class Folder(Workdir):
    """`config.json` with its axes, `group-*.json`, `sweep.csv`, `sweep.parquet`, `curves.jsonl` and `best.py`."""

    def config(self) -> ConfigDict:
        """The config of the sweep."""
        try:
            return configs.from_json((self.path / "config.json").read_text())
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path / 'config.json'} cannot be used: {error}") from error

    @property
    def begun(self) -> bool:
        """Whether there is a run, or a sweep, already."""
        return (self.path / "config.json").exists()

    def results(self) -> list[dict]:
        """The rows of all groups that have ended, by number."""
        rows = []
        for file in self.path.glob("group-*.json"):
            try:
                rows += json.loads(file.read_text())["rows"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise UserError(f"{file} cannot be read ({error}); delete it, and its members train again") from error
        return sorted(rows, key=lambda row: row["number"])


class Sweep:
    """A sweep from its plan to its tables; `limit` is in bytes."""

    def __init__(self, config: ConfigDict, folder: Folder, console: Console, how: str, limit: int):
        self.config, self.folder, self.console, self.how, self.limit = config, folder, console, how, limit
        self.search, self.halving = search.of(config), halving.parse(config.get("halving", ""))
        self.members = self.search.members(config)  # those of a study: what can be wrong with its members
        for member in self.members:
            _check(member.config)
        self.made: dict[str, Group] = {}  # by what makes a group, for the generations to come

    def run(self) -> int:
        """Trains the members that have no result yet. Returns 0."""
        begun = time.time()
        if self.folder.begun:
            self.folder.claim(self.config)
        done = self.folder.results()
        already = f"; {len(done)} are done" if done else ""
        self.console.print(f"{self.told_search()}{', '.join(self.axes())}{already}")
        with contextlib.closing(self.search.generations(self.config, self.folder, self.console.print)) as generations:
            for generation in generations:
                self.members = generation
                done = {row["number"] for row in self.folder.results()}
                self.train([member for member in generation if member.number not in done])
        best = self.tables()
        seconds = text.duration(time.time() - begun)
        self.console.print(f"{best}; {seconds} in all; everything is in {self.folder.path}")
        return 0

    def train(self, left: list[Member]) -> None:
        """Trains some members, and leaves their results in the folder."""
        say = self.console.print
        groups = self.groups(left)
        parts = [self.part(group) for group in groups]
        for i, (group, size) in enumerate(zip(groups, parts), 1):
            say(f"group {i} of {len(groups)}: {self.told(group, size)}")
        self.folder.claim(self.config)  # now that all of it is known to make sense
        for i in range(len(groups)):
            group, size, groups[i] = groups[i], parts[i], None  # what it holds goes when it ends
            together = len(group.courses) if self.halving else size  # they compete
            for start in range(0, len(group.courses), together):
                courses = group.courses[start : start + together]
                if self.halving:
                    rows = halving.train(group, courses, size, self.halving, say)
                else:
                    rows, *_ = group.train(courses, size, say=say)
                name = f"group-{rows[0]['number']:05d}.json"
                self.folder.write(name, json.dumps({"rows": rows}) + "\n")
                self.tables()
                seconds = text.duration(sum(row["seconds"] for row in rows))
                say(f"group {i + 1}: {text.counted(len(rows), 'member')} in {seconds}, {_outcome(rows)}")

    def axes(self) -> list[str]:
        """Each axis and its number of values, or what it is drawn from."""
        told = lambda field, v: f"{field} from {v}" if isinstance(v, Distribution) else f"{len(v)} × {field}"
        return [told(field, values) for field, values in grid.space(self.config).axes.items()]

    def told_search(self) -> str:
        """How many members there are, and how they are chosen."""
        if not self.config.get("search", ""):
            return f"{text.counted(len(self.members), 'member')}: "
        repeats = len(grid.space(self.config).repeats)
        of = f", {repeats} × {self.search.n} members" if repeats > 1 else f", {text.counted(self.search.n, 'member')}"
        return f"{self.config.search}{of}: "

    @functools.cached_property
    def dataset(self):
        """The data set of a member, read once for all that have the same."""
        load = functools.cache(lambda fields: data.load(configs.from_json(fields)))
        return lambda member: load(configs.to_json(member.config.data))

    # ---- the plan

    def groups(self, left: list[Member]) -> list[Group]:
        """The groups of the members that are left."""
        found = []
        for wide in grid.grouped(left, grid.NUMBERS + grid.STREAMS):
            datasets = [self.dataset(member) for member in wide]
            config = wide[0].config
            exp = experiment.build(config, datasets[0].classes)
            kept, said = _keep(exp, datasets)
            free = grid.NUMBERS + (grid.STREAMS if kept else ())
            if _draws_frozen(exp):
                free = tuple(field for field in free if field != "seed")
            self.console.print(f"feature cache: {said}")
            for part in grid.grouped(wide, free):
                found.append(self.group(part, kept))
        return found

    def group(self, found: Sequence[Member], kept: str) -> Group:
        """The group of some members; it goes on with what that of an earlier generation has compiled and computed."""
        made = Group(found, [self.dataset(member) for member in found], self.how, kept)
        if self.search.again:
            key = found[0].key(grid.NUMBERS + grid.STREAMS)
            made.adopt(self.made.get(key))
            self.made[key] = made
        return made

    def need(self, group: Group, size: int) -> int:
        """Bytes that a group takes at most, so many of its members at once."""
        return group.need(size) + (halving.held(group) if self.halving else 0)

    def part(self, group: Group) -> int:
        """How many members of a group are trained at once. Raises UserError where not even one fits."""
        if group.slots:  # compiled
            return group.slots
        count, one = len(group.members), self.need(group, 1)
        if one > self.limit:
            raise UserError(
                f"one member of the group {self.name(group)} needs {text.size(one)}, more than the "
                f"{text.size(self.limit)} of --memory; try a smaller config.batch_size or config.cache_views"
            )
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
        axes = grid.space(self.config).axes
        several = [field for field in axes if isinstance(axes[field], Distribution) or len(axes[field]) > 1]
        return ", ".join(f"{field} = {first[field]!r}" for field in common if field in several) or self.config.name

    def told(self, group: Group, size: int) -> str:
        """A group in one line."""
        count, parts = len(group.members), -(-len(group.members) // size)
        way = {"vmap": "at once", "map": "one by one"}[group.programs.how]
        return (
            f"{self.name(group)}: {text.counted(count, 'member')}"
            + (f" in {parts} parts of {size}" if parts > 1 else "")
            + f", 1 compiled step ({group.programs.how}: {way}), at most {text.size(self.need(group, size))} of "
            f"{text.size(self.limit)}, {max(course.total for course in group.courses):,} steps"
            + (f"; {halving.told(group, self.halving)}" if self.halving else "")
        )

    # ---- the end

    def tables(self) -> str:
        """Writes the tables of what there is so far, and the best config. Returns a line about it."""
        rows = self.folder.results()
        sweep_table.write(self.folder, rows)
        space = grid.space(self.config)
        config_of = lambda row: space.config(row["fields"])
        return sweep_table.best(self.folder, rows, self.config.metric, config_of)


def _check(config: ConfigDict) -> None:
    """Raises UserError for what a sweep cannot do."""
    if config.phases:
        raise UserError(f"config.phases = {config.phases!r}: a sweep has one phase; give config.strategy")
    if config.source.data:
        raise UserError(f"config.source.data = {config.source.data!r}: a sweep does not measure forgetting")


def _keep(exp: Experiment, datasets: list[data.Dataset]) -> tuple[str, str]:
    """Where the features of a frozen prefix are kept ("" for nowhere), and why; "auto": wherever they can be."""
    config = copy.deepcopy(exp.config)
    config.cache = "memory" if config.cache == "auto" else config.cache
    examples = {name: len(split) for name, split in pools(datasets).items()}
    phase = exp.in_time(examples["train"])[0]
    return cache.choose(dataclasses.replace(exp, config=config), phase, examples)


def _draws_frozen(exp: Experiment) -> bool:
    """Whether something that stays frozen, or that holds what trains, depends on the seed."""
    if exp.penalty and exp.penalty.regulariser.fisher:
        return True
    frozen = [leaf.path for leaf in exp.plans[0][1].leaves if not leaf.multiplier]
    return bool(frozen) if exp.card is None else any(matches(p, path) for path in frozen for p in exp.config.reset)


def _outcome(rows: list[dict]) -> str:
    """How many ended how."""
    ends = [row["status"].split(" at ")[0] for row in rows]
    return listing(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))


if __name__ == "__main__":
    command.run(main)
