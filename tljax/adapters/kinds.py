"""The kinds of adapters: what each adds to a module, and how it is folded away again.

An adapter's parameters lie in the tree under the module that it changes (`block3/expand_conv/lora/a`), hence in that
module's stage: plans, optimizers and checkpoints treat them as they treat all parameters. Each kind is the identity
when it is new.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tljax.errors import UserError
from tljax.models import layers
from tljax.patterns import exactly, under

Call = Callable[[jax.Array], jax.Array]  # a module as a function of its first argument


def out_dims(module: nn.Module) -> int:
    """How many of the last dimensions of a linear module's kernel are its features."""
    return len(module.features) if isinstance(module.features, tuple | list) else 1


def is_linear(module: nn.Module) -> bool:
    """Whether the module's output is linear in a parameter `kernel`: Dense, Conv, DenseGeneral and ours.

    Not where the kernel is standardised first: what is added to it, or multiplied, would be folded in otherwise.
    """
    linear = getattr(module, "linear_in_kernel", True)
    return linear and hasattr(module, "features") and module.has_variable("params", "kernel")


def groups(module: nn.Module) -> int:
    """The groups of a convolution, 1 elsewhere."""
    return getattr(module, "groups", getattr(module, "feature_group_count", 1))


@dataclasses.dataclass(frozen=True)
class Site:
    """An adapter at work in one bound module: its parameters there, and what dropout needs."""

    module: nn.Module
    values: dict | None  # None where the module has none: see `has_values`
    last: bool  # of the adapter's modules, in the order of the forward pass
    training: bool
    axis_name: str | None


@dataclasses.dataclass(frozen=True)
class Adapter(abc.ABC):
    """What all kinds share: the key of the parameters, and a pattern of the paths of modules."""

    name: str
    targets: str
    file: str = dataclasses.field(default="", compare=False)  # the values' source where they are not new
    what: ClassVar[str] = "module"

    def chooses(self, path: str) -> bool:
        """Whether the adapter is meant for the module at this path."""
        return exactly(self.targets, path)

    @abc.abstractmethod
    def fits(self, module: nn.Module, x: Any, y: Any) -> bool:
        """Whether a module that maps x to y can be adapted."""

    def within(self, prefix: str) -> "Adapter":
        """The adapter for a tower of a larger model."""
        return dataclasses.replace(self, targets=under(prefix, self.targets))

    def has_values(self, first: bool) -> bool:
        """Whether a module has parameters of the adapter; `first`: it is the first of the adapter's."""
        return True

    @abc.abstractmethod
    def create(self, key: jax.Array, module: nn.Module, path: str, x: jax.Array, y: jax.Array) -> dict:
        """New parameters for the module."""

    @abc.abstractmethod
    def around(self, call: Call, site: Site) -> Call:
        """The module's function with the adapter."""

    def fold(self, params: dict, values: dict) -> dict:
        """The module's own parameters with the adapter folded in. Raises UserError where that cannot be."""
        raise UserError(
            f"adapter {self.name!r}: {type(self).__name__} is no linear map of weights: it cannot be merged"
        )


@dataclasses.dataclass(frozen=True)
class Lora(Adapter):
    """Low-rank adaptation (Hu et al. 2022): y = W x + alpha/rank · B A dropout(x).

    A has the form of the module with `rank` features (a k×k convolution has a k×k A and a 1×1 B), so it runs as the
    module does, stride and padding included, and the gradient of the full-size weight is never formed. A begins
    uniform, B at 0. Depthwise and grouped convolutions have nothing of low rank to gain and are left alone.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    what: ClassVar[str] = "dense layer or ungrouped convolution"

    def fits(self, module, x, y):
        """A linear module that is not grouped."""
        return is_linear(module) and groups(module) == 1 and not getattr(module, "batch_dims", ())

    def create(self, key, module, path, x, y):
        """a: [..., in, rank], b: [rank, *features]."""
        kernel = module.get_variable("params", "kernel")
        n = kernel.ndim - out_dims(module)
        bound = 1 / math.sqrt(math.prod(kernel.shape[:n]))
        a = jax.random.uniform(key, (*kernel.shape[:n], self.rank), kernel.dtype, -bound, bound)
        return {"a": a, "b": jnp.zeros((self.rank, *kernel.shape[n:]), kernel.dtype)}

    def around(self, call, site):
        """Adds the low-rank path beside the module's own."""
        low = site.module.clone(features=self.rank, use_bias=False, parent=None, name=None)

        def adapted(x):
            into = x
            if self.dropout and site.training:
                into = layers.drop(site.module, x, self.dropout, site.axis_name)
            h = low.apply({"params": {"kernel": site.values["a"]}}, into)
            y, b = call(x), (site.values["b"] * (self.alpha / self.rank)).astype(h.dtype)
            # One flat matrix product: over the axes of an image XLA's CPU backend is many times slower.
            return y + (h.reshape(-1, self.rank) @ b.reshape(self.rank, -1)).reshape(y.shape).astype(y.dtype)

        return adapted

    def fold(self, params, values):
        """kernel + alpha/rank · A B."""
        low = jnp.tensordot(values["a"], values["b"], 1) * (self.alpha / self.rank)
        return params | {"kernel": params["kernel"] + low.astype(params["kernel"].dtype)}


@dataclasses.dataclass(frozen=True)
class IA3(Adapter):
    """Learned rescaling (Liu et al. 2022): of a linear module's outputs or, where `inputs` matches, of its inputs."""

    inputs: str = ""
    what: ClassVar[str] = "dense layer or convolution"

    def chooses(self, path):
        """Outputs by `targets`, inputs by `inputs`."""
        return exactly(self.targets, path) or self._scales_inputs(path)

    def within(self, prefix):
        """Both patterns under the prefix."""
        return dataclasses.replace(super().within(prefix), inputs=self.inputs and under(prefix, self.inputs))

    def _scales_inputs(self, path: str) -> bool:
        return bool(self.inputs) and exactly(self.inputs, path)

    def fits(self, module, x, y):
        """A linear module; for inputs one that is not grouped."""
        into = self._scales_inputs("/".join(module.path))
        return is_linear(module) and not getattr(module, "batch_dims", ()) and not (into and groups(module) > 1)

    def create(self, key, module, path, x, y):
        """scale: ones, [*features], or for inputs [in, 1, …]: in both forms kernel * scale is the folded kernel."""
        kernel, n = module.get_variable("params", "kernel"), out_dims(module)
        shape = (x.shape[-1], *[1] * n) if self._scales_inputs(path) else kernel.shape[kernel.ndim - n :]
        return {"scale": jnp.ones(shape, kernel.dtype)}

    def around(self, call, site):
        """Scales what goes in or what comes out."""
        scale = site.values["scale"]
        if self._scales_inputs("/".join(site.module.path)):
            return lambda x: call(x * scale.reshape(-1).astype(x.dtype))

        def adapted(x):
            y = call(x)
            return y * scale.astype(y.dtype)

        return adapted

    def fold(self, params, values):
        """kernel * scale; a bias is part of the outputs, not of the inputs."""
        scale = values["scale"]
        folded = params | {"kernel": params["kernel"] * scale}
        outputs = "bias" in params and scale.shape == params["bias"].shape
        return folded | ({"bias": params["bias"] * scale} if outputs else {})


@dataclasses.dataclass(frozen=True)
class Bottleneck(Adapter):
    """A small two-layer network behind a module (Houlsby et al. 2019): y + up(gelu(down(y))), over the last axis.

    Behind a convolution or a stage of images the two layers are 1×1 convolutions. `up` begins at 0.
    """

    width: int = 16
    what: ClassVar[str] = "module whose output is an array of features"

    def fits(self, module, x, y):
        """Whatever gives an array with features on its last axis."""
        return hasattr(y, "ndim") and y.ndim >= 2

    def create(self, key, module, path, x, y):
        """down/kernel [features, width], up/kernel [width, features], and their biases."""
        features = y.shape[-1]
        dense = lambda kernel: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
        down = jax.random.normal(key, (features, self.width)) / math.sqrt(features)
        return {"down": dense(down), "up": dense(jnp.zeros((self.width, features)))}

    def around(self, call, site):
        """The module, then the bottleneck with its residual connection."""
        dense = lambda x, p: x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)

        def adapted(x):
            y = call(x)
            flat = y.reshape(-1, y.shape[-1])  # see Lora
            return y + dense(jax.nn.gelu(dense(flat, site.values["down"])), site.values["up"]).reshape(y.shape)

        return adapted


@dataclasses.dataclass(frozen=True)
class Prompts(Adapter):
    """Visual prompts (VPT, Jia et al. 2022): learned tokens that transformer blocks see beside the image's.

    `deep`: each block has its own, which are put in front of its input and dropped from its output. Otherwise they
    enter before the first block and leave after the last.
    """

    tokens: int = 10
    deep: bool = True
    what: ClassVar[str] = "module from tokens [batch, tokens, features] to the same shape"

    def fits(self, module, x, y):
        """A module over token sequences that keeps their shape."""
        return hasattr(y, "ndim") and y.ndim == 3 and getattr(x, "shape", None) == y.shape

    def has_values(self, first):
        """Each module, if deep, else the first alone."""
        return self.deep or first

    def create(self, key, module, path, x, y):
        """tokens: [tokens, features]."""
        return {"tokens": 0.02 * jax.random.normal(key, (self.tokens, x.shape[-1]))}

    def around(self, call, site):
        """Puts the tokens in front, and takes them away again."""

        def adapted(x):
            if site.values is not None:
                tokens = jnp.broadcast_to(site.values["tokens"].astype(x.dtype), (x.shape[0], self.tokens, x.shape[-1]))
                x = jnp.concatenate([tokens, x], 1)
            y = call(x)
            return y[:, self.tokens :] if self.deep or site.last else y

        return adapted


KINDS = {kind.__name__: kind for kind in (Lora, IA3, Bottleneck, Prompts)}
