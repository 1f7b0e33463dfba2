"""Layers that all architectures share: convolution, linear map, normalisation, dropout, the classifier.

The form of a convolution is chosen here and nowhere else. On XLA's CPU backend a depthwise convolution is 40
to 80 times slower than a sum of shifted slices, the kernel gradient of a 1x1 convolution 4 times slower than
that of one flattened matrix product, and the gradient of a convolution in groups 100 times slower than that of
ordinary ones side by side; GPU and TPU keep the convolution. The choice is made at lowering, so one traced program
serves all.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from tljax.errors import UserError
from tljax.models.depthwise import Pads, depthwise_conv, large_depthwise_conv

# "SAME" as in TensorFlow at the actual input size, or so many pixels on each side, of height and width if two.
Padding = str | int | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Common:
    """What all layers of a model share: `momentum` is the weight of the old statistics, as flax counts it."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None
    norm: str = "batch"  # a key of NORMS
    groups: int = 0  # of a group norm; 0: at most 32, of at least four channels
    epsilon: float = 1e-5
    momentum: float = 0.9


def plain_conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, groups: int) -> jax.Array:
    """Ordinary convolution. x: [batch, height, width, in], kernel: [kh, kw, in / groups, out]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def pointwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Unpadded 1x1 convolution as one matrix product of all pixels, [pixels, in] @ [in, out]."""
    x = x[:, ::stride, ::stride]
    # Flattened by hand: an einsum over the four axes lowers to something as slow as the convolution.
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


def grouped_conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, groups: int) -> jax.Array:
    """Convolution in groups as ordinary ones side by side, of about 32 channels each, zero between the groups."""
    size, (per_group, out) = kernel.shape[:2], (kernel.shape[2], kernel.shape[3] // groups)
    together = next(n for n in range(max(1, min(groups, 32 // per_group)), 0, -1) if groups % n == 0)
    apart = kernel.reshape(*size, per_group, groups // together, together, out)
    blocks = jnp.einsum("hwisgo,gq->shwqigo", apart, jnp.eye(together, dtype=kernel.dtype))
    blocks = blocks.reshape(-1, *size, together * per_group, together * out)
    parts = jnp.split(x, len(blocks), axis=-1)
    return jnp.concatenate([plain_conv(part, block, stride, pads, 1) for part, block in zip(parts, blocks)], axis=-1)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding = "SAME", groups: int = 1):
    """Convolution in the form that suits the backend. x: [batch, height, width, in] -> [batch, h, w, out]."""
    size = kernel.shape[:2]
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(x.shape[1:3], size, (stride, stride), padding)
    else:
        pads = [(n, n) for n in (padding if isinstance(padding, tuple) else (padding, padding))]
    plain = lambda x, kernel: plain_conv(x, kernel, stride, pads, groups)
    if size == (1, 1) and groups == 1 and not any(map(any, pads)):
        cpu = lambda x, kernel: pointwise_conv(x, kernel, stride)
    elif groups == x.shape[-1] == kernel.shape[-1]:
        cpu = lambda x, kernel: depthwise_conv(x, kernel, stride, pads)
        if stride == 1 and min(size) >= 7:
            cpu = lambda x, kernel: large_depthwise_conv(x, kernel, pads)
    elif groups > 1:
        cpu = lambda x, kernel: grouped_conv(x, kernel, stride, pads, groups)
    else:
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=cpu, default=plain)


def check_halves(x: jax.Array, stage: str) -> None:
    """Raises UserError where nothing would be left of an image [batch, height, width, channels] that is halved."""
    if min(x.shape[1:3]) < 2:
        raise UserError(
            f"the image is too small for this network: {x.shape[1]}×{x.shape[2]} before {stage!r} halves it"
        )


def normal(key: jax.Array, shape: Sequence[int], dtype, scale: float) -> jax.Array:
    """Normal draws times `scale`. Drawn flat: XLA compiles that six times faster than four axes."""
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape) * scale


def conv_init(key: jax.Array, shape: Sequence[int], dtype, groups: int) -> jax.Array:
    """He et al. (2015): normal with variance 2 / fan-out within a group, as in ResNet and EfficientNet."""
    height, width, _, out = shape
    return normal(key, shape, dtype, (2 * groups / (height * width * out)) ** 0.5)


def linear_init(key: jax.Array, shape: Sequence[int], dtype, groups: int = 1) -> jax.Array:
    """LeCun et al. (1998): normal with variance 1 / fan-in, as transformers have it. shape: [..., in, out]."""
    return normal(key, shape, dtype, (1 / math.prod(shape[:-1])) ** 0.5)


class Conv(nn.Module):
    """Convolution: params kernel [*size, in / groups, features] and, if `use_bias`, bias [features]."""

    common: Common
    features: int
    size: int | tuple[int, int] = 1
    stride: int = 1
    padding: Padding = "SAME"
    groups: int = 1
    use_bias: bool = False
    kernel_init: Callable = conv_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, features] in the compute dtype."""
        c = self.common
        size = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        shape = (*size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, c.param_dtype, self.groups)
        kernel = self.used(kernel).astype(c.dtype)
        x = convolve(x.astype(c.dtype), kernel, self.stride, self.padding, self.groups)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,), c.param_dtype).astype(c.dtype)
        return x

    def used(self, kernel: jax.Array) -> jax.Array:
        """What the convolution makes of its kernel before use."""
        return kernel


class Dense(nn.Module):
    """Linear map of the last axis: params kernel [in, features] and, if `use_bias`, bias [features]."""

    common: Common
    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., in] -> [..., features] in the compute dtype."""
        c, (*outer, inputs) = self.common, x.shape
        kernel = self.param("kernel", linear_init, (inputs, self.features), c.param_dtype)
        # One product of two matrices: on XLA's CPU backend the kernel's gradient is then a third faster.
        x = x.astype(c.dtype).reshape(-1, inputs) @ kernel.astype(c.dtype)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,), c.param_dtype).astype(c.dtype)
        return x.reshape(*outer, self.features)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) that is in training mode iff its own path is in `live`.

    Alive, it normalises by the statistics of the global batch (with `axis_name`, over that axis too) and
    moves the stored ones, the variance with n / (n - 1) as PyTorch and TensorFlow do. Otherwise it is a fixed
    affine map.
    """

    common: Common
    scaled: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, channels]; statistics are computed in float32."""
        c, channels = self.common, x.shape[-1:]
        ones = nn.initializers.ones
        scale = self.param("scale", ones, channels, c.param_dtype) if self.scaled else jnp.ones(channels)
        bias = self.param("bias", nn.initializers.zeros, channels, c.param_dtype)
        stored_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        stored_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        mean, var = stored_mean.value, stored_var.value
        x = x.astype(jnp.float32)
        if "/".join(self.path) in live and not self.is_initializing():
            # One pass over x and one exchange between devices; counting from the stored mean rather than from
            # zero spares E[x^2] - E[x]^2 its cancellation.
            apart = x - mean
            moments = jnp.stack([apart.mean((0, 1, 2)), jnp.square(apart).mean((0, 1, 2))])
            count = x.size // x.shape[-1]
            if c.axis_name is not None:
                moments = lax.pmean(moments, c.axis_name)
                count *= lax.axis_size(c.axis_name)
            shift, var = moments[0], jnp.maximum(moments[1] - jnp.square(moments[0]), 0)
            mean = mean + shift
            for stored, new in (stored_mean, mean), (stored_var, var * count / max(count - 1, 1)):
                stored.value = c.momentum * stored.value + (1 - c.momentum) * lax.stop_gradient(new)
        factor = lax.rsqrt(var + c.epsilon) * scale.astype(jnp.float32)
        return ((x - mean) * factor + bias.astype(jnp.float32)).astype(c.dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018): no statistics are stored, `live` is moot."""

    common: Common

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, channels]."""
        c, (*outer, channels) = self.common, x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,), c.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), c.param_dtype)
        groups = c.groups or min(32, channels // 4)
        grouped = x.astype(jnp.float32).reshape(*outer, groups, channels // groups)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        var = grouped.var((1, 2, 4), keepdims=True)
        x = ((grouped - mean) * lax.rsqrt(var + c.epsilon)).reshape(x.shape)
        return (x * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(c.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the channels: no statistics are stored, `live` is moot."""

    common: Common

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [..., channels]."""
        return _layer_norm(self, x)


def _layer_norm(module: nn.Module, x: jax.Array) -> jax.Array:
    c, channels = module.common, x.shape[-1:]
    scale = module.param("scale", nn.initializers.ones, channels, c.param_dtype)
    bias = module.param("bias", nn.initializers.zeros, channels, c.param_dtype)
    x = x.astype(jnp.float32)
    x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + c.epsilon)
    return (x * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(c.dtype)


class PooledNorm(nn.Module):
    """Layer normalisation of the mean over all positions but the first `prefix`, which are of no patch."""

    common: Common
    prefix: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, ..., channels] -> [batch, channels]."""
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return _layer_norm(self, x[:, self.prefix :].astype(jnp.float32).mean(1))


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019) over the channels: a scale, nothing stored."""

    common: Common

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [..., channels]."""
        c = self.common
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], c.param_dtype)
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + c.epsilon)
        return (x * scale.astype(jnp.float32)).astype(c.dtype)


NORMS = {
    "batch": BatchNorm,
    "batch_bias": partial(BatchNorm, scaled=False),
    "group": GroupNorm,
    "layer": LayerNorm,
    "rms": RMSNorm,
}


def norm(common: Common, name: str) -> nn.Module:
    """The normalisation layer that `common.norm` names."""
    return NORMS[common.norm](common, name=name)


def drops(rate: float | jax.Array) -> bool:
    """Whether there is anything to draw: a rate may be traced."""
    return isinstance(rate, jax.Array) or rate > 0


def drop(module: nn.Module, x: jax.Array, rate: float, axis_name: str | None, *, whole: bool = False) -> jax.Array:
    """Dropout (Srivastava et al. 2014) or, if `whole`, of examples: stochastic depth (Huang et al. 2016).

    The mask is drawn for the global batch and with `axis_name` each device takes its slice, so that the
    result does not depend on how the batch is spread. x: [batch, ...].
    """
    batch = x.shape[0]
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    rest = (1,) * (x.ndim - 1) if whole else x.shape[1:]
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, (devices * batch, *rest))
    if axis_name is not None:
        keep = lax.dynamic_slice_in_dim(keep, lax.axis_index(axis_name) * batch, batch)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Head(nn.Module):
    """Dropout and a dense layer: params kernel [features, classes] and bias [classes]."""

    common: Common
    classes: int
    drop_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, features] -> logits [batch, classes], float32."""
        c = self.common
        shape = (x.shape[-1], self.classes)
        kernel = self.param("kernel", normal, shape, c.param_dtype, (1 / x.shape[-1]) ** 0.5)
        bias = self.param("bias", nn.initializers.zeros, (self.classes,), c.param_dtype)
        if drops(self.drop_rate) and "/".join(self.path) in live:
            x = drop(self, x, self.drop_rate, c.axis_name)
        return (x.astype(c.dtype) @ kernel.astype(c.dtype)).astype(jnp.float32) + bias.astype(jnp.float32)
