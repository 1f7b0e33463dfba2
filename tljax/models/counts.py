"""What a network holds and does, counted from its shapes: parameters, and operations of a forward pass."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from tljax.models.chain import Chain


@dataclasses.dataclass(frozen=True)
class Counts:
    """`parameters`: numbers in `params`; `flops`: of a forward pass of one image, a multiply-add being two."""

    parameters: int
    flops: int


def counts(model: Chain, size: int | None = None) -> Counts:
    """The counts at an input of `size` pixels a side, by default the model's own; nothing is computed."""
    size, model = size or model.size, model.clone(axis_name=None)
    # The forward pass is part of initialising: one trace tells both.
    init = lambda key: model.init(key, jnp.zeros((1, size, size, model.channels)))["params"]
    closed, params = jax.make_jaxpr(init, return_shape=True)(jax.random.key(0))
    return Counts(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)), flops(closed.jaxpr))


def flops(jaxpr) -> int:
    """Operations of the matrix products and convolutions in a jaxpr, which are all but a few percent of them all.

    A convolution counts as such, in whichever form a backend computes it: of branches the largest counts.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * (kernel.size // features)
        elif name == "cond":
            total += max(flops(branch.jaxpr) for branch in params["branches"])
        else:
            bodies = (getattr(value, "jaxpr", value) for value in params.values())
            inner = sum(flops(body) for body in bodies if hasattr(body, "eqns"))
            total += params["length"] * inner if name == "scan" else inner
    return total
