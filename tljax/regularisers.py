"""Against forgetting: what trains is held to the loaded weights by 0.5 · Σ strength · F · (w − w₀)².

F is 1 for L2-SP (Li et al. 2018, "Explicit inductive bias for transfer learning") and the diagonal Fisher information
of the source task for EWC (Kirkpatrick et al. 2017). w₀ are the weights as they were loaded, also for what a later
phase thaws. What was not loaded, a new head, has none. In a config: `config.regulariser = "l2_sp(strength=0.01)"`.

In a loop of one's own, on any tree of parameters:

    penalty = resolve(l2_sp(0.01), params, trained={leaf.path for leaf in plan.trainable})
    tx = tljax.freeze(optax.chain(pull(penalty, penalty.anchor(params)), optax.adamw(1e-3)), plan)

where `pull` adds the penalty's gradient to that of the loss.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tljax.config import call
from tljax.data.table import SPLITS
from tljax.errors import UserError, listing
from tljax.patterns import matches
from tljax.plan import build, flat, paths
from tljax.report import text

Tree = Any


@dataclasses.dataclass(frozen=True)
class Regulariser:
    """What a config asks for: ordered (pattern, strength), the first that matches a path decides."""

    strengths: tuple[tuple[str, float], ...]
    new: float = 0.0  # strength toward 0 of what was not loaded
    fisher: bool = False
    source: str = ""  # the photographs that the Fisher information is of; "": those of config.source
    split: str = ""
    batches: int = 0
    labels: str = "model"


def l2_sp(strength: float | Mapping[str, float] = 0.01, new: float = 0.0) -> Regulariser:
    """L2-SP: every weight is held alike. A number, or {pattern: strength} as ordered rules; new: β of the paper."""
    return Regulariser(_strengths("l2_sp", strength), new=_number("l2_sp", "new", new))


def ewc(
    strength: float | Mapping[str, float] = 1.0,
    source: str = "",
    batches: int = 16,
    labels: str = "model",
    split: str = "",
) -> Regulariser:
    """Elastic weight consolidation: a weight is held by how much the source task's likelihood depends on it.

    The Fisher information is that of `batches` batches of `source` (as config.source.data, the default; `split` is
    the part of it), for labels that are drawn from the loaded network's own prediction ("model": the true Fisher,
    Martens 2014) or given ("data").
    """
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
        raise UserError(f"ewc(batches={batches!r}): expected a whole number above 0")
    if labels not in ("model", "data"):
        raise UserError(f"ewc(labels={labels!r}): expected 'model' or 'data'")
    if not isinstance(source, str):
        raise UserError(f"ewc(source={source!r}): expected a data source, as 'folder:DIR'")
    if split not in ("", *SPLITS):
        raise UserError(f"ewc(split={split!r}): expected one of {', '.join(SPLITS)}")
    strengths = _strengths("ewc", strength)
    return Regulariser(strengths, fisher=True, source=source, split=split, batches=batches, labels=labels)


REGULARISERS = {f.__name__: f for f in (l2_sp, ewc)}


def parse(text: str) -> Regulariser | None:
    """The regulariser that a config's text calls, None for "". Raises UserError for unknown names and arguments."""
    return call(text, REGULARISERS, "regulariser") if text else None


def _strengths(name: str, given) -> tuple[tuple[str, float], ...]:
    pairs = tuple(given.items()) if isinstance(given, Mapping) else (("**", given),)
    for pattern, value in pairs:
        if not isinstance(pattern, str):
            raise UserError(f"{name}: {pattern!r} is no pattern")
        _number(name, "strength", value)
    if not any(value for _, value in pairs):
        raise UserError(f"{name}: no strength above 0")
    return pairs


def _number(name: str, what: str, value) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        raise UserError(f"{name}({what}={value!r}): expected a number, 0 or more, or {{pattern: number}}")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Penalty:
    """A regulariser resolved against parameters: which leaves it holds, how strongly, and to what."""

    held: Mapping[str, float]  # {path: strength} to the loaded weights
    new: Mapping[str, float]  # {path: strength} to 0
    regulariser: Regulariser

    def anchor(self, params: Tree, fisher: Tree = None) -> dict[str, Tree]:
        """{"params": the loaded weights, "fisher": F or None}: trees like the parameters, None where nothing is held.

        `params` are the weights as loaded; `fisher`, a tree that has the held leaves, is needed by EWC alone.
        """
        of = lambda tree, kind: _map(tree, lambda path, leaf: leaf.astype(kind or leaf.dtype), set(self.held))
        if not self.regulariser.fisher:
            return {"params": of(params, None), "fisher": None}
        return {"params": of(params, None), "fisher": of(fisher, jnp.float32)}

    def said(self, params: Tree) -> str:
        """How much is held, and what that costs, in one line."""
        leaves = flat(params)
        held, new = (sum(leaves[path].size for path in group) for group in (self.held, self.new))
        each = lambda leaf: leaf.dtype.itemsize + 4 * self.regulariser.fisher
        size = sum(leaves[path].size * each(leaves[path]) for path in self.held)
        also = f", {new:,} new ones to 0" if new else ""
        return f"{held:,} values held to the loaded ones{also}; their anchor takes {text.size(size)}"

    def __call__(self, trainable: Tree, anchor: dict[str, Tree]) -> tuple[jax.Array, Tree]:
        """Returns (0.5 · Σ strength · F · (w − w₀)², its gradient) for the trainable part of the parameters."""
        loaded, fisher = (flat(anchor[name]) for name in ("params", "fisher"))
        total, gradients = jnp.zeros((), jnp.float32), []
        leaves, structure = jax.tree.flatten(trainable)
        for path, leaf in zip(paths(trainable), leaves):
            strength = self.held.get(path) or self.new.get(path) or 0.0
            distance = leaf.astype(jnp.float32)
            if path in self.held:
                distance = distance - loaded[path].astype(jnp.float32)
            weight = fisher[path] if self.regulariser.fisher and path in self.held else 1.0
            pull = strength * weight * distance
            total += 0.5 * jnp.sum(pull * distance)
            gradients.append(pull.astype(leaf.dtype) if strength else jnp.zeros_like(leaf))
        return total, structure.unflatten(gradients)


def resolve(regulariser: Regulariser, params: Tree, trained: Collection[str], reset: Collection[str] = ()) -> Penalty:
    """Resolves strengths against parameters (arrays or shapes), as a plan does rules.

    `trained` are the paths that train at some time: the others need no anchor. `reset` are patterns of what was not
    loaded. Raises UserError for a path that no pattern matches and for a pattern that decides nothing.
    """
    names = paths(params)
    free = [name for name in names if not any(matches(pattern, name) for pattern, _ in regulariser.strengths)]
    if free:
        raise UserError(f"config.regulariser: no pattern matches {listing(free)}: end them with '**': 0")
    try:
        strengths = {leaf.path: leaf.multiplier for leaf in build(regulariser.strengths, params).leaves}
    except UserError as error:
        raise UserError(f"config.regulariser: {error}") from None
    fresh = {path for path in strengths if any(matches(pattern, path) for pattern in reset)}
    held = {p: s for p, s in strengths.items() if s and p in trained and p not in fresh}
    new = {p: regulariser.new for p in strengths if regulariser.new and p in trained and p in fresh}
    return Penalty(held, new, regulariser)


def pull(penalty: Penalty, anchor: dict[str, Tree]) -> optax.GradientTransformation:
    """Adds the penalty's gradient to that of the loss: for training loops of one's own, before a clip."""

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("pull needs the parameters: tx.update(grads, state, params)")
        return jax.tree.map(jnp.add, grads, penalty(params, state)[1]), state

    return optax.GradientTransformation(lambda params: anchor, update)


def _map(tree: Tree, of, wanted: set[str]) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([of(p, leaf) if p in wanted else None for p, leaf in zip(paths(tree), leaves)])
