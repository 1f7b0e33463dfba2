"""Sums over arrays by which a checkpoint proves that it came back as it was saved.

The words of an array, of 4 bytes or as many as its values have, are summed modulo 2^64, each times an odd weight of its
place, a product of one pseudo-random weight an axis. So one changed word is always noticed, any other damage but for
one in about 2^32 cases at the worst, and a sum over an array that is laid over devices and processes is the sum over
its parts, wherever they lie: it needs no gathering, and is the same for any layout. It guards against faults, not
against forgery.
"""

import functools
from typing import Any

import jax
import numpy as np

from tljax.plan import flat

Tree = Any


def of(tree: Tree) -> dict[str, str]:
    """{path: 16 hexadecimal digits} of every array, over the parts that all processes hold."""
    found = flat(tree)
    sums = np.array([_own(leaf) for leaf in found.values()], np.uint64)
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import process_allgather

        # As 32-bit words: without jax_enable_x64 longer ones do not pass through a device.
        parts = np.asarray(process_allgather(sums.view(np.uint32)))
        sums = np.ascontiguousarray(parts).view(np.uint64).reshape(-1, len(sums)).sum(0, dtype=np.uint64)
    return {path: f"{int(value):016x}" for path, value in zip(found, sums)}


def _own(leaf: Any) -> int:
    """The sum over the parts that this process holds, each counted on one device."""
    if not isinstance(leaf, jax.Array):
        return part(np.asarray(leaf)) if jax.process_index() == 0 else 0
    held = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    return sum(part(np.asarray(s.data), [i.start or 0 for i in s.index]) for s in held) % 2**64


def part(values: np.ndarray, starts: tuple[int, ...] | list[int] = ()) -> int:
    """The sum over a part of an array that begins at the indices `starts`, by default at the first."""
    if values.dtype.itemsize > 4:  # an axis of words
        values = np.asarray(values, order="C")[..., None].view(np.uint32)
    words = (values if values.ndim else values[None]).view(f"u{values.dtype.itemsize}")
    starts = [*starts, *[0] * (words.ndim - len(starts))]
    for axis in reversed(range(words.ndim)):
        weights = _weights(axis, starts[axis], words.shape[axis])
        words = np.einsum("...i,i->...", words, weights, dtype=np.uint64, casting="unsafe")
    return int(words)


@functools.lru_cache(maxsize=64)
def _weights(axis: int, start: int, count: int) -> np.ndarray:
    """Odd pseudo-random numbers for the indices of an axis (SplitMix64, Steele et al. 2014)."""
    z = (np.arange(start + 1, start + count + 1, dtype=np.uint64) + np.uint64(axis << 40)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)
