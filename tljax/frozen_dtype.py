"""Frozen leaves stored in the compute dtype, where that changes no result (`config.parallel.frozen_dtype`).

A layer casts its kernel to the compute dtype at each use, and for a kernel that never trains the cast may as well be
done once, before it is placed. Which leaves a model reads so, and not in float32 (as a norm reads its scale), is read
off the traced model rather than guessed from their names.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from ml_collections import ConfigDict

from tljax.errors import UserError, listing
from tljax.plan import flat, paths

if TYPE_CHECKING:
    from tljax.experiment import Experiment

Tree = Any


def check(config: ConfigDict) -> None:
    """Raises UserError where storing frozen leaves in another dtype would change what the step reads."""
    wanted = config.parallel.frozen_dtype
    if wanted not in ("", config.dtype):
        raise UserError(
            f"config.parallel.frozen_dtype = {wanted!r} needs config.dtype = {wanted!r}, not {config.dtype!r}: "
            "the step would no longer read the values that were loaded"
        )


def narrow(exp: "Experiment") -> frozenset[str]:
    """The paths of the parameters that an experiment stores in `config.parallel.frozen_dtype`; none where it is "".

    They train in no phase, and the model reads them in no other way than cast to that dtype.
    """
    dtype = exp.config.parallel.frozen_dtype
    found = {leaf.path for leaf in exp.plans[0][1].leaves} if dtype else set()
    if not found:
        return frozenset()
    model, size, stats = exp.model.clone(axis_name=None), exp.preprocessing.size, exp.shapes["batch_stats"]
    image = jax.ShapeDtypeStruct((1, size, size, exp.config.channels), jnp.float32)
    for live in (frozenset(), frozenset().union(*(plan.live for _, plan in exp.plans))):

        def forward(params, stats, x, key, live=live):
            variables = {"params": params, "batch_stats": stats}
            return model.apply(variables, x, live=live, rngs={"dropout": key}, mutable=["batch_stats"])

        found &= cast_alone(forward, exp.shapes["params"], dtype, stats, image, jax.random.key(0))
    return frozenset(found - {leaf.path for _, plan in exp.plans for leaf in plan.trainable})


def widened(exp: "Experiment", params: Tree) -> Tree:
    """A run's parameters with those that it stores narrow as the weights have them, which are loaded anew.

    For what leaves the run: files, and weights into which adapters are folded. Raises UserError where the weights are
    no longer those that the run began with.
    """
    if not exp.narrow:
        return params
    config = exp.config.copy_and_resolve_references()
    config.parallel.frozen_dtype = ""
    base = flat(dataclasses.replace(exp, config=config).load()[0])
    values, structure = flat(params), jax.tree.structure(params)
    same = lambda path: np.array_equal(np.asarray(base[path]).astype(values[path].dtype), values[path])
    differing = [path for path in sorted(exp.narrow) if not same(path)]
    if differing:
        raise UserError(f"the weights are not those that the run began with: {listing(differing, 3)} differ")
    return structure.unflatten([base[path] if path in exp.narrow else value for path, value in values.items()])


def cast_alone(function, tree: Tree, dtype: Any, *more: Any) -> frozenset[str]:
    """The paths of a tree's leaves that `function(tree, *more)` uses, and only ever casts to a dtype.

    It is traced on shapes. A leaf that is of this dtype already is none of them.
    """
    closed = jax.make_jaxpr(function)(tree, *more)
    leaves = list(zip(paths(tree), jax.tree.leaves(tree), closed.jaxpr.invars))
    is_cast = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != dtype
    given = {var: path for path, leaf, var in leaves if is_cast(leaf)}
    cast, other = _uses(closed.jaxpr, given, jnp.dtype(dtype))
    return frozenset(cast - other)


# What only rearranges values may as well come after the cast.
_REARRANGE = ("reshape", "broadcast_in_dim", "squeeze", "transpose", "slice", "copy")


def _uses(jaxpr, given: dict, dtype) -> tuple[set[str], set[str]]:
    """(what of the given is cast to the dtype somewhere, what is used otherwise somewhere)."""
    given, cast, other = dict(given), set(), set()
    for eqn in jaxpr.eqns:
        read = {atom: given[atom] for atom in _variables(eqn.invars) if atom in given}
        if not read:
            continue
        if eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"] == dtype:
            cast |= set(read.values())
            continue
        if eqn.primitive.name in _REARRANGE:
            given[eqn.outvars[0]] = given[eqn.invars[0]]
            continue
        bodies = _bodies(eqn)
        if not bodies:
            other |= set(read.values())
        for body, operands in bodies:
            pairs = zip(body.invars, operands)
            within = {var: read[atom] for var, atom in pairs if not isinstance(atom, Literal) and atom in read}
            more, others = _uses(body, within, dtype)
            cast, other = cast | more, other | others
    return cast, other | {given[atom] for atom in _variables(jaxpr.outvars) if atom in given}


def _variables(atoms) -> list:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _bodies(eqn) -> list[tuple[Any, list]]:
    """(jaxpr, its operands) of what an equation calls once with its operands as they are; else none."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return [(branch.jaxpr, eqn.invars[1:]) for branch in params["branches"]]
    if name in ("scan", "while", "shard_map"):  # which slice them, or go round
        return []
    found = next((params[key] for key in ("jaxpr", "call_jaxpr") if hasattr(params.get(key), "eqns")), None)
    body = getattr(found, "jaxpr", found)
    return [(body, eqn.invars)] if body is not None and len(body.invars) == len(eqn.invars) else []
