"""Which members of a sweep are alike: what one compiled step can train, and whether features can be kept for it."""

import copy
import dataclasses
from collections.abc import Callable, Sequence

from tljax import cache, data, experiment, grid, strategies
from tljax.experiment import Experiment
from tljax.grid import Member
from tljax.group import pools
from tljax.patterns import matches


def wide(members: Sequence[Member], dataset: Callable[[Member], data.Dataset]) -> list[tuple[Member, ...]]:
    """Members that one compiled step can train if their photographs allow it.

    They differ in numbers, streams and, where their plans are of one kind, in the strategy.
    """
    found = []
    for same in grid.grouped(members, (*grid.NUMBERS, *grid.STREAMS, "strategy")):
        parsed = {member.config.strategy: strategies.parse(member.config.strategy) for member in same}
        kinds = {text: text for text in parsed}  # adapters make another model
        plain = [member for member in same if not strategies.adapters_of(parsed[member.config.strategy])]
        if len({member.config.strategy for member in plain}) > 1:
            exp = experiment.build(plain[0].config, dataset(plain[0]).classes)
            kinds |= {m.config.strategy: exp.plan_of(parsed[m.config.strategy]).kind for m in plain}
        groups: dict[str, list[Member]] = {}
        for member in same:
            groups.setdefault(kinds[member.config.strategy], []).append(member)
        found += map(tuple, groups.values())
    return found


def keep(exp: Experiment, datasets: list[data.Dataset]) -> tuple[str, str]:
    """Where the features of a frozen prefix are kept ("" for nowhere), and why; "auto": wherever they can be."""
    config = copy.deepcopy(exp.config)
    config.cache = "memory" if config.cache == "auto" else config.cache
    examples = {name: len(split) for name, split in pools(datasets).items()}
    phase = exp.in_time(examples["train"])[0]
    return cache.choose(dataclasses.replace(exp, config=config), phase, examples)


def draws_frozen(exp: Experiment) -> bool:
    """Whether something that stays frozen, or that holds what trains, depends on the seed."""
    if exp.penalty and exp.penalty.regulariser.fisher:
        return True
    frozen = [leaf.path for leaf in exp.plans[0][1].leaves if not leaf.multiplier]
    return bool(frozen) if exp.card is None else any(matches(p, path) for path in frozen for p in exp.config.reset)
