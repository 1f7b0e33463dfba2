"""How much memory a program takes at most, by its jaxpr, and how much there is."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

Tree = Any


def nbytes(tree: Tree) -> int:
    """The size of a tree of arrays, or of the shapes of some."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def peak(function, *arguments) -> int:
    """Bytes that live at once, at most, while a function of arrays (or of their shapes) runs, its arguments included.

    Without compiling: each operation's result takes its room until its last use. The compiler fuses and takes less.
    """
    return nbytes(arguments) + _made(jax.make_jaxpr(function)(*arguments).jaxpr)


def _made(jaxpr) -> int:
    """Bytes of what a jaxpr makes that live at once, at most."""
    variables = lambda atoms: {atom for atom in atoms if not isinstance(atom, Literal)}
    last = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last |= dict.fromkeys(variables(eqn.invars), i)
    last |= dict.fromkeys(variables(jaxpr.outvars), len(jaxpr.eqns))
    dying: dict[int, list] = {}
    live = most = 0
    for i, eqn in enumerate(jaxpr.eqns):
        made = sum(map(_size, eqn.outvars))
        inner = [_made(found) for value in eqn.params.values() for found in _jaxprs(value)]
        most = max(most, live + max([made, *inner]))
        for out in eqn.outvars:
            if out in last:
                dying.setdefault(last[out], []).append(out)
                live += _size(out)
        live -= sum(map(_size, dying.pop(i, ())))
    return most


def _jaxprs(value) -> list:
    """The jaxprs in an equation's parameter."""
    if isinstance(value, tuple | list):
        return [found for item in value for found in _jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def _size(atom) -> int:
    aval = atom.aval
    if jnp.issubdtype(getattr(aval, "dtype", jnp.float32), jax.dtypes.prng_key):
        return 0
    return math.prod(getattr(aval, "shape", (0,))) * jnp.dtype(getattr(aval, "dtype", jnp.float32)).itemsize


def free() -> int:
    """Bytes that each device here has left; CPU devices have equal shares of what the machine has."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return machine() // len(devices)


def machine() -> int:
    """Bytes of the machine's memory that nobody uses."""
    try:
        with open("/proc/meminfo") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
