"""The plan: rules resolved against the parameters' shapes. What trains, and all that follows from it.

A plan serves any pytree: nothing here knows flax. Its parameters are the leaves that have a shape and a dtype; others
(an Equinox module holds functions and numbers, too) belong to the frozen part, and no rule is needed for them.
`python -m tljax.plan --config=…` prints the plan of an experiment, without weights and without data.
"""

USAGE = {
    "description": "Prints the plan of an experiment: a row a stage, totals, and what each rule decided.",
    "cost": "--cost also prints what a step costs, as the compiler estimates it",
    "compare": "strategies to compare by cost, as frozen,partial:last=2,full",
    "devices": "so many devices for --cost (default: 1)",
    "picture": "where --compare draws (default: plan.png)",
}
if __name__ == "__main__":  # before what is slow to import
    from tljax import command

    command.help_if_asked(**USAGE)

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import UserError, listing, nearest, unknown
from tljax.patterns import matches

Tree = Any
NO_DECAY = ("**/bias", "**/scale", "**/position*")
NORM_STATS = ("plan", "frozen", "batch")


def paths(tree: Tree) -> tuple[str, ...]:
    """The path of every leaf, in the order of `jax.tree.leaves`: keys joined by `/`."""
    return tuple(
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    )


def flat(tree: Tree) -> dict[str, Any]:
    """{path: leaf} of every leaf."""
    return dict(zip(paths(tree), jax.tree.leaves(tree)))


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one, and no key of random numbers."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter as the plan sees it."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    multiplier: float  # of the learning rate; 0 is frozen
    decay: bool  # whether weight decay applies
    rule: int  # index of the rule that decided

    @property
    def stage(self) -> str:
        """The top-level key."""
        return self.path.split("/")[0]

    @property
    def label(self) -> str:
        """The optax label: leaves with one multiplier share it."""
        return f"x{self.multiplier:.17g}" if self.multiplier else "frozen"

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rules resolved against parameters: per leaf a multiplier, a label and a decay flag; made by `build`."""

    stages: tuple[str, ...]
    rules: tuple[tuple[str, float], ...]
    leaves: tuple[Leaf, ...]
    structure: Any  # treedef of the parameters, with None for what is none
    stats: tuple[tuple[str, int], ...]  # (path, number of values) of the normalisation statistics
    norm_stats: str = "plan"  # which statistics move: as the plan says, none ("frozen"), all ("batch")

    @property
    def trainable(self) -> tuple[Leaf, ...]:
        """The leaves with a multiplier above 0."""
        return tuple(leaf for leaf in self.leaves if leaf.multiplier)

    def tree(self, of: Callable[[Leaf], Any], trainable_only: bool = False) -> Tree:
        """A tree like the parameters that holds `of(leaf)`; frozen ones are None with `trainable_only`."""
        return self.structure.unflatten(
            [None if trainable_only and not leaf.multiplier else of(leaf) for leaf in self.leaves]
        )

    def split(self, tree: Tree) -> tuple[Tree, Tree]:
        """Parts a tree like the parameters into (trainable, frozen); absent leaves are None, hence no leaves.

        Raises UserError where the tree is not the one that the plan was made for.
        """
        values, owners, structure = self._flatten(tree)
        trains = [leaf is not None and leaf.multiplier > 0 for leaf in owners]
        return (
            structure.unflatten([v if t else None for v, t in zip(values, trains)]),
            structure.unflatten([None if t else v for v, t in zip(values, trains)]),
        )

    def merge(self, trainable: Tree, frozen: Tree) -> Tree:
        """The inverse of `split`."""
        is_none = lambda x: x is None
        return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=is_none)

    def split_stats(self, stats: Tree) -> tuple[Tree, Tree]:
        """Parts normalisation statistics into (those that move, those that are stored), as `split` does parameters."""
        values, structure = jax.tree.flatten(stats)
        moves = [path.rpartition("/")[0] in self.live_norms for path in paths(stats)]
        return (
            structure.unflatten([v if moving else None for v, moving in zip(values, moves)]),
            structure.unflatten([None if moving else v for v, moving in zip(values, moves)]),
        )

    def _flatten(self, tree: Tree) -> tuple[list, list[Leaf | None], Any]:
        """Returns (values, the leaf that each is the value of, treedef); None for what is no parameter."""
        values, structure = jax.tree.flatten(tree)
        if structure == self.structure:
            return values, list(self.leaves), structure
        found, bare = _parameters(values, structure)
        if bare != self.structure:
            names = [name for name, keep in zip(paths(tree), found) if keep]
            have, want = set(names), {leaf.path for leaf in self.leaves}
            what = f"missing {listing(sorted(want - have)) or 'nothing'}; unexpected {listing(sorted(have - want))}"
            raise UserError(f"the tree is not the plan's: {what if have != want else 'other containers'}")
        leaves = iter(self.leaves)
        return values, [next(leaves) if keep else None for keep in found], structure

    @functools.cached_property
    def live_stages(self) -> tuple[str, ...]:
        """The stages in which something trains."""
        live = {leaf.stage for leaf in self.trainable}
        return tuple(stage for stage in self.stages if stage in live)

    @functools.cached_property
    def live_norms(self) -> frozenset[str]:
        """Module paths of the norms that normalise by the batch and whose stored statistics move.

        Those of which a parameter trains (a norm without parameters of its own follows its stage), unless
        `norm_stats` says that none moves, or that all do.
        """
        if self.norm_stats == "plan":
            return self._norms_that_train
        return self._norms if self.norm_stats == "batch" else frozenset()

    @functools.cached_property
    def _norms(self) -> frozenset[str]:
        return frozenset(path.rpartition("/")[0] for path, _ in self.stats)

    @functools.cached_property
    def _norms_that_train(self) -> frozenset[str]:
        live = set()
        for norm in self._norms:
            own = [leaf for leaf in self.leaves if leaf.path.startswith(norm + "/")]
            if any(leaf.multiplier for leaf in own) or (not own and norm.split("/")[0] in self.live_stages):
                live.add(norm)
        return frozenset(live)

    @property
    def live(self) -> frozenset[str]:
        """What runs in training mode, as models take it: live stages and live norms, by module path."""
        return self.live_norms | frozenset(self.live_stages)

    @property
    def prefix(self) -> tuple[str, ...]:
        """The frozen prefix: the stages from the input on in which nothing trains and no statistics move."""
        moving = {*self.live_stages, *(norm.split("/")[0] for norm in self.live_norms)}
        return tuple(itertools.takewhile(lambda stage: stage not in moving, self.stages))

    @property
    def cut(self) -> str | None:
        """The stage that takes what the frozen prefix gives; None where the first stage moves already."""
        return self.stages[len(self.prefix)] if self.prefix else None

    @functools.cached_property
    def frozen(self) -> dict[str, int]:
        """{path: number of values} of all that is frozen: `params/…`, and `batch_stats/…` that do not move."""
        params = {f"params/{leaf.path}": leaf.size for leaf in self.leaves if not leaf.multiplier}
        still = {f"batch_stats/{p}": n for p, n in self.stats if p.rpartition("/")[0] not in self.live_norms}
        return params | still

    def frozen_digests(self, params: Tree, stats: Tree) -> dict[str, str]:
        """SHA-256 of the bytes of everything in `frozen`, by path: equal digests are equal bits."""
        pairs = zip(*self._flatten(params)[:2])
        values = {f"params/{leaf.path}": value for value, leaf in pairs if leaf is not None}
        values |= {f"batch_stats/{path}": value for path, value in zip(paths(stats), jax.tree.leaves(stats))}
        return digests({path: values[path] for path in self.frozen})

    @property
    def kind(self) -> str:
        """SHA-256 over what a compiled step depends on: plans of one kind differ in their multipliers alone."""
        trains = {leaf.path: f"{leaf.shape} {bool(leaf.multiplier)} {leaf.decay}" for leaf in self.leaves}
        return combined(trains | {f"batch_stats/{norm}": "moves" for norm in self.live_norms})

    @property
    def digest(self) -> str:
        """SHA-256 over what the plan decides: path, shape, multiplier and decay of every leaf.

        And of the norms that do otherwise than what trains would have them do, whether their statistics move.
        """
        otherwise = {f"batch_stats/{n}": str(n in self.live_norms) for n in self.live_norms ^ self._norms_that_train}
        return combined({leaf.path: f"{leaf.shape} {leaf.label} {leaf.decay}" for leaf in self.leaves} | otherwise)

    def totals(self) -> dict[str, int]:
        """{"parameters": number of values, "trainable": of which these train}."""
        return {
            "parameters": sum(leaf.size for leaf in self.leaves),
            "trainable": sum(leaf.size for leaf in self.trainable),
        }

    def rule_counts(self) -> list[tuple[str, float, int]]:
        """(pattern, multiplier, number of leaves decided) of every rule."""
        counts = [0] * len(self.rules)
        for leaf in self.leaves:
            counts[leaf.rule] += 1
        return [(pattern, multiplier, n) for (pattern, multiplier), n in zip(self.rules, counts)]

    def rows(self, optimizer_bytes: dict[str, int] | None = None) -> list[dict]:
        """A row a stage for the plan's table; `optimizer_bytes` is {leaf path: bytes of its moments}."""
        rows = []
        for stage in self.stages:
            leaves = [leaf for leaf in self.leaves if leaf.stage == stage]
            norms = {p.rpartition("/")[0] for p, _ in self.stats if p.split("/")[0] == stage}
            moving = len(norms & self.live_norms)
            live = [leaf for leaf in leaves if leaf.multiplier]
            decayed = sum(leaf.decay for leaf in live)
            rows.append(
                {
                    "stage": stage,
                    "parameters": sum(leaf.size for leaf in leaves),
                    "trainable": sum(leaf.size for leaf in live),
                    "multiplier": _span([leaf.multiplier for leaf in leaves]),
                    "decay": "no" if not decayed else "yes" if decayed == len(live) else "some",
                    "norm": "-"
                    if not norms
                    else ("stored" if not moving else "moving" if moving == len(norms) else "some moving"),
                    "optimizer_bytes": sum((optimizer_bytes or {}).get(leaf.path, 0) for leaf in leaves),
                }
            )
        return rows


def digests(values: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the bytes of each array."""
    return {path: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest() for path, value in values.items()}


def combined(digests: dict[str, str]) -> str:
    """One SHA-256 over named digests."""
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in sorted(digests.items())).encode()).hexdigest()


def _differentiable(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _parameters(values: list, structure: Any) -> tuple[list[bool], Any]:
    """Returns (which leaves are parameters, the treedef with None for the others)."""
    found = [is_parameter(value) for value in values]
    return found, jax.tree.structure(structure.unflatten([0 if keep else None for keep in found]))


def _span(values: Iterable[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g}–{high:.3g}"


def build(
    rules: Iterable[tuple[str, float]],
    params: Tree,
    stats: Tree = None,
    stages: tuple[str, ...] | None = None,
    no_decay: tuple[str, ...] = NO_DECAY,
    norm_stats: str = "plan",
) -> Plan:
    """Resolves ordered rules against parameters: the first rule that matches a path decides.

    `params` and `stats` are trees of arrays or of shapes (`jax.ShapeDtypeStruct`); `stages` are their
    top-level keys from input to output (by default in the tree's order). Weight decay leaves out what
    `no_decay` matches and every leaf of fewer than two dimensions. `norm_stats`: "plan", the statistics of a norm
    move iff one of its own parameters trains; "frozen", none do; "batch", all do, as elsewhere by default.

    Raises UserError: a path that no rule matches, a rule that decides no path, nothing that trains, integers that would
    train, two leaves of one path.
    """
    rules = tuple(rules)
    if norm_stats not in NORM_STATS:
        raise unknown("norm_stats", norm_stats, NORM_STATS)
    values, structure = jax.tree.flatten(params)
    found, structure = _parameters(values, structure)
    names, shapes = ([x for x, keep in zip(of, found) if keep] for of in (paths(params), values))
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"several leaves have the path {listing(twice)}: rules could not tell them apart")
    if stages is None:
        stages = tuple(dict.fromkeys(name.split("/")[0] for name in names))
    leaves, unmatched = [], []
    for name, shape in zip(names, shapes):
        rule = next((i for i, (pattern, _) in enumerate(rules) if matches(pattern, name)), None)
        if rule is None:
            unmatched.append(name)
            continue
        decay = len(shape.shape) >= 2 and not any(matches(pattern, name) for pattern in no_decay)
        leaves.append(Leaf(name, tuple(shape.shape), np.dtype(shape.dtype), float(rules[rule][1]), decay, rule))
    if unmatched:
        raise UserError(f"no rule matches {listing(unmatched)}: end the rules with ('**', 0) to freeze the rest")
    idle = [rules[i][0] for i in range(len(rules)) if i not in {leaf.rule for leaf in leaves}]
    for pattern in idle:
        if any(matches(pattern, name) for name in names):
            raise UserError(f"rule {pattern!r} decides nothing: earlier rules match every path that it matches")
        raise UserError(f"rule {pattern!r} matches no parameter{nearest(pattern, (*stages, *names))}")
    whole = [f"{leaf.path} ({leaf.dtype})" for leaf in leaves if leaf.multiplier and not _differentiable(leaf.dtype)]
    if whole:
        raise UserError(f"no gradient exists for {listing(whole)}: freeze with rules before those that decide them")
    if not any(leaf.multiplier for leaf in leaves):
        raise UserError("everything is frozen: no rule gives a multiplier above 0")
    sizes = tuple((p, math.prod(s.shape)) for p, s in zip(paths(stats), jax.tree.leaves(stats)))
    return Plan(tuple(stages), rules, tuple(leaves), structure, sizes, norm_stats)


def main(argv: list[str]) -> int:
    """Prints the plan of an experiment: a row a stage, totals, and what each rule decided."""
    from tljax import experiment
    from tljax.command import from_command_line
    from tljax.report.console import Console

    flags = from_command_line(["--cost=yes" if arg == "--cost" else arg for arg in argv], **USAGE)
    config, console = flags.config, Console()
    classes = experiment.classes_without_data(config)
    console.plan(experiment.plan_table(experiment.build(config, classes)))
    if flags.cost or flags.compare:
        from tljax import cost

        for line in cost.main_lines(config, classes, flags.compare, flags.devices, flags.picture):
            console.print(line)
    return 0


if __name__ == "__main__":
    from tljax.plan import main as packaged_main  # so that classes are those of the package, not of __main__

    command.run(packaged_main)
