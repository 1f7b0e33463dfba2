"""Where the gradients in a traced step come from and where they go: one walk over its jaxpr.

JAX marks what reverse-mode differentiation writes: the name stack of such an equation has a `transpose(…)`. A value
that a marked equation makes and an unmarked one uses is therefore a gradient that leaves the backward pass.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

NOTHING: frozenset = frozenset()
# Value unchanged, for an operand of the same shape and dtype.
_SAME = {"convert_element_type", "copy", "copy_p", "reshape", "sharding_constraint", "squeeze", "transpose", "pvary",
         "optimization_barrier", "reshard", "broadcast_in_dim", "name", "stop_gradient"}  # fmt: skip
_ZERO_IF_ALL = {"add", "sub", "add_any", "neg", "select_n", "max", "min", "abs", "concatenate", "slice", "reduce_sum",
                "dynamic_slice", "sign", "sqrt", "stack"} | _SAME  # fmt: skip
_ZERO_IF_ANY = {"mul", "dot_general"}
_NO_CALL = ("reduce", "pallas", "scatter")  # their jaxprs say what happens to an entry, not to the arrays


@dataclasses.dataclass(frozen=True)
class Value:
    """What the walk knows of one value."""

    alias: int | None = None  # it is this input of the step, unchanged
    zero: bool = False  # it is 0 everywhere, as far as finite numbers go
    gradients: frozenset = NOTHING  # gradients that are in it entry by entry, not only as a norm
    leaves: frozenset = NOTHING  # the inputs that are in it entry by entry, gradients apart
    joined: frozenset = NOTHING  # frozen inputs that were put into one array with trainable ones
    batch: bool = False  # depends on an input that is no parameter
    trains: bool = False  # depends on a trainable parameter
    backward: bool = False  # made in the backward pass

    def join(self, other: "Value") -> "Value":
        """What holds of a value that is one of the two."""
        return Value(
            self.alias if self.alias == other.alias else None,
            self.zero and other.zero,
            self.gradients | other.gradients,
            self.leaves | other.leaves,
            self.joined | other.joined,
            self.batch or other.batch,
            self.trains or other.trains,
            self.backward or other.backward,
        )


@dataclasses.dataclass
class Gradient:
    """A value that left the backward pass."""

    shape: tuple[int, ...]
    scope: str  # the name stack of what made it: with flax it holds the module's path
    users: list = dataclasses.field(default_factory=list)  # the equations outside the backward pass that use it

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def backward(eqn) -> bool:
    """Whether reverse-mode differentiation wrote the equation."""
    return re.search(r"\btranspose\(", str(eqn.source_info.name_stack)) is not None


def _shape(atom) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


class Walk:
    """Follows values through a jaxpr without dead code.

    `trainable` and `frozen` are the indices of the step's inputs that are such parameters. Afterwards: `outputs`, a
    Value each; `gradients` {key: Gradient}; `made` {index: equation} of the outputs; `shapes` {input: its shapes, as
    a whole and as a device's part}; `scans` [(equation, joined)] of scans that are differentiated.
    """

    def __init__(self, closed: ClosedJaxpr, trainable: set[int], frozen: set[int]):
        self.trainable, self.frozen = trainable, frozen
        self.gradients, self.shapes, self.scans, self.scopes = {}, {}, [], {}
        self.makers: dict[Any, Any] = {}
        inputs = [
            Value(alias=i, leaves=frozenset([i]), batch=i not in trainable | frozen, trains=i in trainable)
            for i in range(len(closed.jaxpr.invars))
        ]
        self.outputs = self.run(closed.jaxpr, closed.consts, inputs)
        self.made = {i: self.makers.get(v) for i, v in enumerate(closed.jaxpr.outvars) if not isinstance(v, Literal)}

    def run(self, jaxpr, consts: Sequence, inputs: Sequence[Value]) -> list[Value]:
        """Returns the values of the jaxpr's outputs."""
        known: dict[Any, Value] = {}

        def read(atom) -> Value:
            return Value(zero=_is_zero(atom.val)) if isinstance(atom, Literal) else known[atom]

        def write(var, value: Value) -> None:
            known[var] = value
            if value.alias is not None:
                self.shapes.setdefault(value.alias, set()).add(_shape(var))

        for var, const in zip(jaxpr.constvars, consts):
            write(var, Value(zero=_is_zero(const)))
        for var, value in zip(jaxpr.invars, inputs):
            write(var, value)
        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            if backward(eqn):
                found = [self.born(eqn, var, values) for var in eqn.outvars]
            else:
                inner = self.inner(eqn, values)
                found = inner if inner is not None else self.plain(eqn, values)
            for var, value in zip(eqn.outvars, found, strict=True):
                self.makers.setdefault(var, eqn)
                write(var, value)
        self.scopes[id(jaxpr)] = jaxpr, {v for v, value in known.items() if value.batch and not value.backward}
        return [read(atom) for atom in jaxpr.outvars]

    def born(self, eqn, var, values: Sequence[Value]) -> Value:
        """An output of an equation of the backward pass."""
        self.gradients.setdefault(var, Gradient(_shape(var), str(eqn.source_info.name_stack)))
        # A cotangent always stands for something trainable or for what is differentiated though it is frozen.
        batch, trains = (any(getattr(v, name) for v in values) for name in ("batch", "trains"))
        return Value(gradients=frozenset([var]), batch=batch, trains=trains, backward=True)

    def plain(self, eqn, values: Sequence[Value]) -> list[Value]:
        """The outputs of an equation that holds no other jaxpr."""
        name = eqn.primitive.name
        for key in frozenset().union(*(v.gradients for v in values)):
            if not any(user is eqn for user in self.gradients[key].users):
                self.gradients[key].users.append(eqn)
        some = {f: any(getattr(v, f) for v in values) for f in ("batch", "trains")}
        joined = frozenset().union(*(v.joined for v in values))
        if name in ("concatenate", "stack"):
            only_frozen = [v.leaves for v in values if v.leaves <= self.frozen and not (v.trains or v.batch)]
            if any(v.trains and not v.batch for v in values):
                joined |= frozenset().union(*only_frozen)
        out = []
        for position, var in enumerate(eqn.outvars):
            size = math.prod(_shape(var))
            gradients = frozenset(k for v in values for k in v.gradients if self.gradients[k].size <= size)
            leaves = frozenset(
                i for v, a in zip(values, eqn.invars) for i in v.leaves if math.prod(_shape(a)) <= max(size, 1)
            )
            zero = (name in _ZERO_IF_ALL and all(v.zero for v in values)) or (
                name in _ZERO_IF_ANY and any(v.zero for v in values)
            )
            alias = self.unchanged(eqn, values, position)
            out.append(Value(alias, zero, gradients, leaves, joined, **some))
        return out

    def unchanged(self, eqn, values: Sequence[Value], position: int) -> int | None:
        """The input of the step that an output is, or None."""
        name, var = eqn.primitive.name, eqn.outvars[position]
        whole = [_shape(a) == _shape(var) and a.aval.dtype == var.aval.dtype for a in eqn.invars]
        if name == "optimization_barrier":
            return values[position].alias
        if name in _SAME and len(values) == 1 and whole[0]:
            moved = name == "transpose" and tuple(eqn.params["permutation"]) != tuple(range(len(_shape(var))))
            return None if moved else values[0].alias
        if name in ("add", "add_any", "sub"):
            if values[1].zero and whole[0]:
                return values[0].alias
            return values[1].alias if values[0].zero and whole[1] and name != "sub" else None
        if name == "select_n" and len({v.alias for v in values[1:]}) == 1:
            return values[1].alias
        return None

    def inner(self, eqn, values: Sequence[Value]) -> list[Value] | None:
        """The outputs of an equation that holds jaxprs (jit, scan, cond, remat, shard_map, …), else None."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            if "ft_in" in params:  # JAX from 0.12 on
                consts, carry, _ = map(len, params["ft_in"].unpack())
            else:
                consts, carry = params["num_consts"], params["num_carry"]
            slices = values[consts + carry :]
            if "jvp(" in str(eqn.source_info.name_stack):
                self.scans += [(eqn, v.joined) for v in slices if v.joined]
            body = params["jaxpr"]
            out = self.loop(body, values[:consts], values[consts : consts + carry], slices)
        elif name == "while":
            first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
            body = params["body_jaxpr"]
            out = self.loop(body, values[first:second], values[second:], ())
            self.enter(params["cond_jaxpr"], [*values[:first], *out])
        elif name == "cond":
            body, *others = params["branches"]
            out = self.enter(body, values[1:])
            for other in others:
                out = [a.join(b) for a, b in zip(out, self.enter(other, values[1:]))]
        else:
            body = next((params[key] for key in ("jaxpr", "call_jaxpr") if hasattr(params.get(key), "eqns")), None)
            inner = getattr(body, "jaxpr", body)
            if body is None or len(inner.invars) != len(values) or name.startswith(_NO_CALL):
                return None
            out = self.enter(body, values)
        for var, within in zip(eqn.outvars, getattr(body, "jaxpr", body).outvars):
            self.makers[var] = eqn if isinstance(within, Literal) else self.makers.get(within, eqn)
        return out

    def kept(self, leaks: set) -> dict:
        """{activation: equation that uses it} of those of the forward pass that the leaking gradients alone need."""
        found = {}
        variables = lambda eqns: {a for eqn in eqns for a in eqn.invars if not isinstance(a, Literal)}
        for jaxpr, forward in self.scopes.values():
            passes = [eqn for eqn in jaxpr.eqns if backward(eqn)]
            # From what leaves the backward pass rightly, back to all that it is made of.
            outside = variables(eqn for eqn in jaxpr.eqns if not backward(eqn))
            needed = (outside | {v for v in jaxpr.outvars if not isinstance(v, Literal)}) - leaks
            rightful = []
            for eqn in reversed(passes):
                if needed & set(eqn.outvars):
                    rightful.append(eqn)
                    needed |= variables([eqn])
            owed, marked = variables(rightful), set(map(id, rightful))
            for eqn in passes:
                if id(eqn) not in marked:
                    found |= {v: eqn for v in variables([eqn]) & forward - owed if math.prod(_shape(v)) > 1}
        return found

    def enter(self, body, values: Sequence[Value]) -> list[Value]:
        """The outputs of a jaxpr that may or may not bring its constants."""
        return self.run(getattr(body, "jaxpr", body), getattr(body, "consts", ()), values)

    def loop(self, body, consts, carry, slices) -> list[Value]:
        """What holds after any number of rounds; an array of which rounds take slices is no longer itself."""
        slices = [dataclasses.replace(v, alias=None) for v in slices]
        carry = list(carry)
        while True:
            out = self.enter(body, [*consts, *carry, *slices])
            joined = [a.join(b) for a, b in zip(carry, out)]
            if joined == carry:
                stacked = [dataclasses.replace(v, alias=None) for v in out[len(carry) :]]
                return [*carry, *stacked]
            carry = joined


def _is_zero(constant) -> bool:
    if isinstance(constant, jax.Array) and not constant.is_fully_addressable:
        return False
    try:
        return not np.any(np.asarray(constant))
    except TypeError:  # a key of random numbers
        return False
