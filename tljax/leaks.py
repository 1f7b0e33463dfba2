"""The leak lint: what in a training step forms or uses a gradient of a frozen leaf.

`tljax.lint(step, plan, *args)` traces the step on shapes, leaves out dead code as the compiler does, and follows
every gradient from the backward pass to what uses it. So it judges what runs, not what is written: gradients of
frozen leaves that nothing uses are never computed, and are no finding.
"""

import dataclasses
import math
import os
import sysconfig
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval

from tljax.dataflow import Gradient, Walk
from tljax.errors import UserError, listing
from tljax.plan import Leaf, Plan, paths

COLLECTIVES = ("psum", "pmean", "pmax", "pmin", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "ppermute")
_JAX, _PACKAGES = os.path.dirname(jax.__file__), sysconfig.get_path("purelib")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One leak. `str` makes a readable line of it."""

    kind: str  # "gradient", "collective", "change", "state" or "activations"
    leaves: tuple[str, ...]  # paths of the frozen leaves that it may be about
    what: str  # what happens to them
    where: str  # file:line (function) of the code that does it

    def __str__(self):
        return f"{self.what}, at {self.where}"


def lint(step: Callable, plan: Plan, *args: Any, params: str = "") -> tuple[Finding, ...]:
    """Returns what in `step(*args)` forms or uses a gradient of a frozen leaf; empty where nothing does.

    `args` are trees of arrays or shapes, as the step takes them (under `jax.jit`, `jax.pmap` and `jax.shard_map` too);
    the parameters, or their frozen part, are found in them by path. `params` is their place where several trees could
    be meant: `"0/params"` is the field or key `params` of the first argument.

    Found are gradients that enter a norm, a metric, a clip, a collective or an update; frozen leaves that do not
    leave as they came (weight decay outside the mask); optimizer state for them; activations that are kept for
    their sake. Gradients are those of JAX's reverse mode: ones that a step writes out by hand are not seen.
    Raises UserError where the frozen leaves are not among the arguments, and where there is no gradient at all.
    """
    args, traced = _arrays_alone(step, args)
    closed, out_shapes = jax.make_jaxpr(traced, return_shape=True)(*args)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    inputs = _Owned(plan, args)
    outputs = _Owned(plan, out_shapes)
    place = inputs.place(params)
    frozen = {i: inputs.leaf[i] for i in inputs.groups[place] if not inputs.leaf[i].multiplier}
    trainable = {i: leaf for i, leaf in inputs.leaf.items() if leaf.multiplier}
    walk = Walk(ClosedJaxpr(live, closed.consts), set(trainable), set(frozen))
    if not any(gradient.users for gradient in walk.gradients.values()) and not any(v.gradients for v in walk.outputs):
        raise UserError(
            "lint: the step has no backward pass by jax.grad whose gradients it uses: nothing was looked at"
        )
    leaks = _gradients(walk, plan, frozen, trainable, outputs)
    found = [_leak(walk.gradients[key], candidates) for key, candidates in leaks.items()]
    found += _outputs(walk, frozen, inputs, outputs, place)
    found += _activations(walk, frozen, set(leaks))
    return tuple(dict.fromkeys(found))


def _arrays_alone(step: Callable, args: tuple) -> tuple[tuple, Callable]:
    """The arguments with None for what is no array (functions in a module), and the step over these."""
    is_array = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
    only = lambda tree: jax.tree.map(lambda x: x if is_array(x) else None, tree)
    leaves, structure = jax.tree.flatten(args)
    if all(map(is_array, leaves)):
        return args, lambda *arrays: only(step(*arrays))

    def traced(*arrays):
        given = iter(jax.tree.leaves(arrays))
        whole = structure.unflatten([next(given) if is_array(x) else x for x in leaves])
        return only(step(*whole))

    return only(args), traced


class _Owned:
    """The leaves of a tree that are a parameter's or its moments': those whose path ends with a parameter's."""

    def __init__(self, plan: Plan, tree: Any):
        self.names = paths(tree)
        self.shapes = [tuple(np.shape(x)) for x in jax.tree.leaves(tree)]
        self.leaf: dict[int, Leaf] = {}
        self.groups: dict[str, list[int]] = {}  # prefix of the path: indices
        by_path = {leaf.path: leaf for leaf in plan.leaves}
        self.frozen = {leaf.path for leaf in plan.leaves if not leaf.multiplier}
        for i, (name, shape) in enumerate(zip(self.names, self.shapes)):
            keys = name.split("/")
            # The longest ending decides: "a/bias" before "bias".
            owner = next((p for j in range(len(keys)) if (p := "/".join(keys[j:])) in by_path), None)
            if owner and by_path[owner].shape in (shape, shape[1:]):
                self.leaf[i] = by_path[owner]
                self.groups.setdefault(name.removesuffix(owner).rstrip("/"), []).append(i)

    def place(self, given: str) -> str:
        """The prefix under which the parameters lie: the first that holds every frozen leaf."""
        full = [p for p, group in self.groups.items() if self.frozen <= {self.leaf[i].path for i in group}]
        named = [p for p in full if p.split("/")[-1] == "params"]
        chosen = given if given else (named or full or [None])[0]
        if chosen not in full:
            raise UserError(
                f"lint: no argument holds the frozen leaves{f' under {given!r}' if given else ''}: give the step's "
                f"arguments as it takes them{'; they are under ' + listing(full) if full else ''}"
            )
        return chosen


def _gradients(walk: Walk, plan: Plan, frozen: dict, trainable: dict, outputs: _Owned) -> dict[Any, list[Leaf]]:
    """The gradients that are used and belong to nothing that trains: {key: the frozen leaves that it may be of}."""
    used = {key: g for key, g in walk.gradients.items() if g.users}
    reached: dict[Any, set[int]] = {}
    for i, value in enumerate(walk.outputs):
        for key in value.gradients:
            used.setdefault(key, walk.gradients[key])
            reached.setdefault(key, set()).add(i)
    shapes: dict[str, set] = {}
    for i, leaf in (frozen | trainable).items():
        shapes.setdefault(leaf.path, {leaf.shape}).update(walk.shapes.get(i, ()))
    of_shape = lambda g, leaves: [leaf for leaf in leaves if g.shape in shapes.get(leaf.path, {leaf.shape})]
    still = [leaf for leaf in plan.leaves if not leaf.multiplier]

    found, unclaimed, claimed = {}, {}, set()
    for key, gradient in used.items():
        owners = [outputs.leaf[i] for i in reached.get(key, ()) if i in outputs.leaf]
        goes_to = {
            kind: [o for o in of_shape(gradient, owners) if bool(o.multiplier) is kind] for kind in (True, False)
        }
        if goes_to[True] and gradient.size > 1:
            claimed |= {leaf.path for leaf in goes_to[True]}  # it moves a leaf that trains: that is what it is for
        elif goes_to[False] and not goes_to[True]:
            found[key] = goes_to[False]
        elif of_shape(gradient, still):
            unclaimed[key] = gradient, goes_to[True]
    # What is left has the shape of a frozen leaf and no leaf of its own in the output. A leaf that trains takes one:
    # by name if it is of its module, else if it has none yet.
    free = [leaf for leaf in plan.trainable if leaf.path not in claimed]
    named = lambda gradient: max((_common(gradient, leaf) for leaf in of_shape(gradient, free)), default=0)
    for key, (gradient, owners) in sorted(unclaimed.items(), key=lambda item: -named(item[1][0])):
        takers = [leaf for leaf in (owners or of_shape(gradient, free)) if leaf in free]
        takers.sort(key=lambda leaf: -_common(gradient, leaf))
        candidates = of_shape(gradient, still)
        best_frozen = max((_common(gradient, leaf) for leaf in candidates), default=0)
        if takers and _common(gradient, takers[0]) >= best_frozen:
            free.remove(takers[0])
        else:
            found[key] = candidates
    return found


def _common(gradient: Gradient, leaf: Leaf) -> int:
    """How many keys of the leaf's module the gradient's scope ends with: flax names scopes by module."""
    module = leaf.path.split("/")[:-1]
    scope = gradient.scope.split("/")
    return max((n for n in range(1, len(module) + 1) if _holds(scope, module[:n])), default=0)


def _holds(scope: list[str], keys: list[str]) -> bool:
    return any(scope[i : i + len(keys)] == keys for i in range(len(scope)))


def _leak(gradient: Gradient, candidates: list[Leaf]) -> Finding:
    """The finding about a gradient that belongs to one of the candidates."""
    closest = max(_common(gradient, leaf) for leaf in candidates)
    names = tuple(leaf.path for leaf in candidates if _common(gradient, leaf) == closest)
    users = gradient.users
    together = [eqn for eqn in users if eqn.primitive.name.startswith(COLLECTIVES)]
    reductions = [eqn for eqn in users if math.prod(getattr(eqn.outvars[0].aval, "shape", ())) < gradient.size]
    telling = (together or reductions or users or [None])[0]
    if together:
        what = f"goes through the collective {telling.primitive.name}"
    elif reductions:
        what = f"is reduced to one of the step's figures by {telling.primitive.name}"
    else:
        what = f"is used by {telling.primitive.name}" if telling else "is an output of the step"
    whose = names[0] if len(names) == 1 else f"leaves ({listing(names, 4)})"
    kind = "collective" if together else "gradient"
    return Finding(kind, names, f"a gradient of frozen {whose} {what}", source(telling))


def _outputs(walk: Walk, frozen: dict, inputs: _Owned, outputs: _Owned, place: str) -> list[Finding]:
    """The outputs that are a frozen leaf's and did not come in."""
    index = {leaf.path: i for i, leaf in frozen.items()}
    found = []
    for i, leaf in outputs.leaf.items():
        value = walk.outputs[i]
        if leaf.multiplier or value.alias is not None:
            continue
        prefix = outputs.names[i].removesuffix(leaf.path).rstrip("/")
        name, where = outputs.names[i], source(walk.made.get(i))
        if prefix == place or index[leaf.path] in value.leaves:
            found.append(
                Finding("change", (leaf.path,), f"frozen {leaf.path} does not leave the step as it came", where)
            )
        elif not value.gradients:
            found.append(
                Finding("state", (leaf.path,), f"state for frozen {leaf.path} is kept in output {name}", where)
            )
        else:
            found.append(
                Finding("state", (leaf.path,), f"output {name} is made from the gradient of frozen {leaf.path}", where)
            )
    return found


def _activations(walk: Walk, frozen: dict, leaks: set) -> list[Finding]:
    """Activations that only the gradients of frozen leaves need."""
    found = []
    for eqn, joined in walk.scans:
        names = tuple(sorted(frozen[i].path for i in joined if i in frozen))
        what = (
            f"{listing(names, 4)} and what trains are scanned over as one array: a stop_gradient before comes too "
            "late, the backward pass runs through the frozen ones and keeps their activations"
        )
        found.append(Finding("activations", names, what, source(eqn)))
    kept = walk.kept(leaks)
    if kept:
        size = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)
        what = (
            f"{len(kept)} activations ({size:,} bytes) are kept for gradients of frozen leaves alone: "
            "stop the gradient before what is frozen, or differentiate plan.split(params)[0] alone"
        )
        found.append(Finding("activations", (), what, source(next(iter(kept.values())))))
    return found


def source(eqn) -> str:
    """`file.py:12 (function)` of the user's code that wrote an equation, with the library function it called."""
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    frames = [f for f in (traceback.frames if traceback else ()) if not f.file_name.startswith((_JAX, "<"))]
    if not frames:
        return "an unknown line"
    users = [f for f in frames if not f.file_name.startswith(_PACKAGES)] or frames
    name = lambda frames: next((n for f in frames if (n := f.function_name.split("<locals>.")[-1])[0] != "<"), "module")
    via = "" if users[0] is frames[0] else f", in {os.path.basename(frames[0].file_name)}: {name(frames)}"
    return f"{os.path.basename(users[0].file_name)}:{users[0].line_num} ({name(users)}{via})"
