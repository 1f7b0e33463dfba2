"""Delta checkpoints: of a state only what the base does not hold.

The base are the weights as their file has them. What has trained in no phase is still, bit for bit, the base's: the run
proves it at every save, so a checkpoint may leave it out.
"""

import math
from collections.abc import Container
from typing import Any

import jax
import numpy as np

from tljax.errors import UserError, listing
from tljax.parallel import Layout
from tljax.plan import Plan, combined, paths
from tljax.step import State

Tree = Any


def cut(state: State, absent: Container[str]) -> State:
    """The state with None for the parameters and statistics in `absent` (`params/…`, `batch_stats/…`)."""
    params, stats = (_those(lambda path: path not in absent, *pair) for pair in _named(state.params, state.stats))
    return state._replace(params=params, stats=stats)


def fill(
    state: State, plan: Plan, base: tuple[Tree, Tree], digests: dict[str, str], layout: Layout, name: str
) -> State:
    """The inverse of `cut`: what the state lacks is taken from `base`, its (params, stats), and placed.

    `digests` are those that what is absent had when the run began. Raises UserError, naming both digests and the
    leaves that differ, where the base is another one.
    """
    found = plan.frozen_digests(*base)
    found = {path: found[path] for path in digests}
    differing = [path for path in digests if found[path] != digests[path]]
    if differing:
        raise UserError(
            f"{name} is a delta to the base {combined(digests)[:16]}, the weights loaded are {combined(found)[:16]}: "
            f"{listing(differing, 3)} differ{'s' if len(differing) == 1 else ''}"
        )
    held = [_those(lambda path: path in digests, *pair) for pair in _named(*base)]
    params, stats = (plan.merge(kept, layout.place(taken)) for kept, taken in zip((state.params, state.stats), held))
    return state._replace(params=params, stats=stats)


def nbytes(tree: Tree) -> int:
    """Bytes of a tree's arrays, or of the arrays that shapes speak of."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _named(params: Tree, stats: Tree) -> tuple[tuple[str, Tree], ...]:
    return ("params", params), ("batch_stats", stats)


def _those(wanted, prefix: str, tree: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([x if wanted(f"{prefix}/{p}") else None for p, x in zip(paths(tree), leaves)])
