"""Freezing in time: a phase is a plan and the steps in which it is in force.

The plan is a pure function of the step, so a run that is resumed anywhere is the run that was never stopped.
When the plan changes, the optimizer's state of leaves that go on training is kept, bit for bit, and a leaf that
starts to train gets exactly the updates of a fresh optimizer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tljax import strategies
from tljax.config import call, duration
from tljax.errors import UserError
from tljax.plan import Plan, flat, paths
from tljax.step import State
from tljax.strategies import Strategy

Tree = Any
REST = "rest"  # the duration of what is left of config.train_for
Schedule = Callable[[tuple[str, ...]], tuple[tuple[str, Strategy], ...]]  # stages -> (duration, strategy) …


class Phase(NamedTuple):
    """A plan, in force from step `start` up to `stop`; `births`: the step at which each leaf began to train."""

    plan: Plan
    start: int
    stop: int
    births: dict[str, int]


# ---- what a config may call


def phases(*pairs: tuple[str, Strategy]) -> Schedule:
    """Any list: `phases(("2 epochs", frozen()), ("rest", partial(last=4)))`."""
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and callable(pair[1])):
            raise UserError(f"phase {pair!r}: expected (duration, strategy)")
    return lambda stages: pairs


def lp_ft(head: str = "5 epochs", then: Strategy | None = None) -> Schedule:
    """Linear probing, then fine-tuning of everything or of what `then` says (LP-FT, Kumar et al. 2022)."""
    return phases((head, strategies.frozen()), (REST, then or strategies.full()))


def gradual_unfreezing(every: str = "1 epochs") -> Schedule:
    """The head, then one more stage each `every`, from the last to the first (ULMFiT, Howard & Ruder 2018)."""

    def write(stages):
        depths = range(len(stages))
        return tuple((every if n < len(stages) - 1 else REST, strategies.partial(last=n)) for n in depths)

    return write


def chain_thaw(each: str = "1 epochs") -> Schedule:
    """The head, then every stage alone from the first to the last, then all (Felbo et al. 2017)."""

    def write(stages):
        alone = tuple((each, strategies.rules((stage, 1), ("**", 0))) for stage in (stages[-1], *stages[:-1]))
        return (*alone, (REST, strategies.full()))

    return write


def freeze_progressively(every: str = "1 epochs", groups: int = 4) -> Schedule:
    """Everything, then fewer: each `every` the next of `groups` groups of stages from the input is frozen.

    As FreezeOut (Brock et al. 2017), in steps instead of by annealing each layer's rate. The head always trains.
    """
    if groups < 1:
        raise UserError(f"freeze_progressively(groups={groups}): expected at least 1")

    def write(stages):
        body = len(stages) - 1
        left = sorted({body - body * k // groups for k in range(groups + 1)}, reverse=True)
        return tuple((REST if n == left[-1] else every, strategies.partial(last=n)) for n in left)

    return write


SCHEDULES = {f.__name__: f for f in (phases, lp_ft, gradual_unfreezing, chain_thaw, freeze_progressively)}


def parse(text: str) -> Schedule:
    """Returns the schedule that a config's text calls. Raises UserError for unknown names and arguments."""
    found = call(text, strategies.known() | SCHEDULES, "phases")
    if text.split("(")[0].strip() not in SCHEDULES:
        raise UserError(f"config.phases = {text!r}: a strategy; expected one of {', '.join(SCHEDULES)}")
    return found


# ---- phases in steps


def resolve(plans: list[tuple[str, Plan]], total: int, steps_per_epoch: float) -> tuple[Phase, ...]:
    """Lays (duration, plan) pairs over the run's `total` steps. Raises UserError where they do not fit it."""
    found, start = [], 0
    for i, (length, plan) in enumerate(plans):
        last = i == len(plans) - 1
        stop = total if length == REST else start + duration(length, steps_per_epoch, "phases")
        if stop <= start or stop > total or (last and stop < total) or (length == REST and not last):
            raise UserError(
                f"phase {i + 1} of {len(plans)} ({length}) would run from step {start} to {stop}, the run "
                f"(config.train_for) has {total}: durations must add up to it, the last may be 'rest'"
            )
        before = found[-1].births if found else {}
        found.append(Phase(plan, start, stop, {leaf.path: before.get(leaf.path, start) for leaf in plan.trainable}))
        start = stop
    return tuple(found)


def index(phases: tuple[Phase, ...], step: int) -> int:
    """The phase whose update led to `step`: a state saved on a boundary is still the ending phase's."""
    return next(i for i, phase in enumerate(phases) if step <= phase.stop)


def never_trained(phases: tuple[Phase, ...]) -> dict[str, int]:
    """{path: number of values} of what is frozen in all of these phases."""
    first, *others = (phase.plan.frozen for phase in phases)
    return {path: size for path, size in first.items() if all(path in frozen for frozen in others)}


def change(state: State, new: Plan, tx: optax.GradientTransformation) -> State:
    """The state with which the next phase begins: what both phases train goes on, what is thawed starts afresh.

    `tx` is the new phase's optimizer. The moving average of a leaf that is thawed starts as the leaf; that of one
    that freezes is dropped.
    """
    trainable, _ = new.split(state.params)
    average = state.average
    if average is not None:
        average = {"params": _kept(average["params"], trainable), "stats": average["stats"]}
    return state._replace(optimizer=_kept(state.optimizer, tx.init(trainable)), average=average)


def _kept(old: Tree, fresh: Tree) -> Tree:
    """`fresh` with the leaves of `old` at the paths that both have (a leaf's age is part of its state's path)."""
    kept = flat(old)
    leaves, structure = jax.tree.flatten(fresh)
    # A copy of what is fresh: the state is donated, and a buffer of the parameters must not be donated twice.
    return structure.unflatten([kept.get(p, jnp.copy(leaf)) for p, leaf in zip(paths(fresh), leaves)])
