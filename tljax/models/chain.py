"""A model is a chain of stages from input to output, at the granularity at which people freeze.

The top-level keys of `params` are exactly the stages, and any run of stages can be applied alone: the feature
cache, the probes of every layer and the transferability scores come from that one ability.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tljax import errors

NOTHING: frozenset[str] = frozenset()


def between(stages: Sequence[str], start: str | None, stop: str | None) -> tuple[str, ...]:
    """The stages from `start` to before `stop`, as in a slice; a name that is no stage raises UserError."""
    for name in (start, stop):
        if name is not None and name not in stages:
            raise errors.unknown("stage", name, stages)
    first = 0 if start is None else stages.index(start)
    last = len(stages) if stop is None else stages.index(stop)
    return tuple(stages[first:last])


class Chain(nn.Module):
    """Stages applied one after another; an architecture says which (`stages`), makes each, and how it pools.

    A stage is a module called with `(x, live)` and named as in `stages`; the last one is "head".
    """

    num_classes: int = 1000
    size: int = 224  # the input's height and width at which the published weights were trained
    channels: int = 3  # of the images
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages in order, the last one "head"."""
        raise NotImplementedError

    def stage(self, name: str) -> nn.Module:
        """The module of one stage, bearing the stage's name."""
        raise NotImplementedError

    def pool(self, x: jax.Array) -> jax.Array:
        """Between the last body stage and the head: [batch, h, w, features] -> [batch, features], float32.

        What that stage has pooled already stays.
        """
        x = x.astype(jnp.float32)
        return x if x.ndim == 2 else x.mean((1, 2))

    @nn.compact
    def __call__(
        self, x: jax.Array, live: frozenset[str] = NOTHING, start: str | None = None, stop: str | None = None
    ) -> jax.Array:
        """Applies the stages from `start` to before `stop`; all: images to logits [batch, classes], float32.

        x: normalised images [batch, height, width, channels], or with `start` what that stage takes; `stop="head"`
        returns pooled features [batch, features], which `start="head"` takes. `live` holds the module paths
        in training mode: a norm ("block3/bn1") in it uses and moves batch statistics, a stage ("block3") in
        it drops out; by default none. An unknown stage raises UserError.
        """
        for name in between(self.stages, start, stop):
            x = self.stage(name)(x, live)
            if name == self.stages[-2]:
                x = self.pool(x)
        return x
