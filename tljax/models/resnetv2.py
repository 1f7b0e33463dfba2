"""BiT: ResNet-v2 (He et al. 2016) with group norm and standardised kernels (Kolesnikov et al. 2020)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from tljax.models import layers, naming
from tljax.models.chain import Chain


@dataclasses.dataclass(frozen=True)
class Variant:
    """Blocks in each of the layers, multiplier of all widths, channels of the stem, groups of the norms."""

    depths: tuple[int, ...]
    factor: int
    stem: int = 64
    groups: int = 32
    size: int = 448

    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(channels within, stride) of each block; a block gives four times as many."""
        return tuple(
            (self.stem * self.factor * 2**layer, 2 if layer and not i else 1)
            for layer, depth in enumerate(self.depths)
            for i in range(depth)
        )


_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

VARIANTS = {
    **{
        f"resnetv2_{depth}x{factor}_bit": Variant(_DEPTHS[depth], factor)
        for depth, factor in ((50, 1), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4))
    },
    # Not published: for tests.
    "resnetv2_tiny": Variant((1, 2), 1, stem=8, groups=4, size=32),
}


class StandardisedConv(layers.Conv):
    """Convolution whose kernel has mean 0 and variance 1 for each output channel (Qiao et al. 2019)."""

    linear_in_kernel = False  # adapters ask

    def used(self, kernel: jax.Array) -> jax.Array:
        """The kernel, standardised in float32."""
        kernel = kernel.astype(jnp.float32)
        axes = (0, 1, 2)
        apart = kernel - kernel.mean(axes)
        return apart * lax.rsqrt(jnp.square(apart).mean(axes) + 1e-8)


class Stem(nn.Module):
    """7x7 convolution and 3x3 max pool: a quarter of the height and width. The norm comes within the blocks."""

    common: layers.Common
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, 3] -> [batch, height / 4, width / 4, features]."""
        x = StandardisedConv(self.common, self.features, 7, 2, padding=3, name="conv")(x)
        # Padded with zeros, not with what no maximum is.
        return nn.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (2, 2))


class Block(nn.Module):
    """Pre-activation bottleneck: norm, ReLU and convolution three times, 1x1, 3x3, 1x1."""

    common: layers.Common
    channels: int
    stride: int
    drop_path_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, 4 * channels]."""
        c, n, inputs = self.common, self.channels, x
        for i, (features, size, stride) in enumerate(((n, 1, 1), (n, 3, self.stride), (4 * n, 1, 1)), 1):
            x = jax.nn.relu(layers.norm(c, f"norm{i}")(x, live))
            if i == 1 and (inputs.shape[-1] != 4 * n or self.stride != 1):
                inputs = StandardisedConv(c, 4 * n, 1, self.stride, padding=0, name="downsample_conv")(x)
            x = StandardisedConv(c, features, size, stride, padding=size // 2, name=f"conv{i}")(x)
        if self.drop_path_rate and "/".join(self.path) in live:
            x = layers.drop(self, x, self.drop_path_rate, c.axis_name, whole=True)
        return x + inputs


class ResNetV2(Chain):
    """Stages stem, block1, ..., norm, head, the blocks numbered through all layers; symmetric padding."""

    variant: Variant = VARIANTS["resnetv2_50x1_bit"]

    @property
    def stages(self) -> tuple[str, ...]:
        """stem, block1, ..., blockN, norm, head."""
        return ("stem", *(f"block{i}" for i in range(1, sum(self.variant.depths) + 1)), "norm", "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        v = self.variant
        common = layers.Common(self.dtype, self.param_dtype, self.axis_name, norm="group", groups=v.groups)
        if name == "stem":
            return Stem(common, v.stem * v.factor, name=name)
        if name == "norm":
            return layers.norm(common, name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        blocks, i = v.blocks(), int(name.removeprefix("block")) - 1
        return Block(common, *blocks[i], self.drop_path_rate * i / len(blocks), name=name)

    def pool(self, x: jax.Array) -> jax.Array:
        """ReLU, and the mean over the image: [batch, h, w, features] -> [batch, features], float32."""
        return super().pool(jax.nn.relu(x))


def create(name: str, **fields) -> ResNetV2:
    """The network called `name`; without `fields` it drops nothing, as published."""
    variant = VARIANTS[name]
    return ResNetV2(variant=variant, **{"size": variant.size, **fields})


def conversion(name: str) -> dict[str, naming.Table]:
    """The tables for timm's state dicts and for the names in Google's .npz files."""
    depths = VARIANTS[name].depths

    def number(first):
        return lambda match: sum(depths[: int(match[1]) - first]) + int(match[2]) - first + 1

    return {"timm": naming.table(_timm(), number(0)), "google": naming.table(_google(), number(1))}


def _timm() -> list[naming.Row]:
    block = r"stages\.(\d+)\.blocks\.(\d+)\."
    rows = naming.conv(r"stem\.conv", "stem/conv", use_bias=False)
    for i in (1, 2, 3):
        rows += naming.affine(f"{block}norm{i}", f"block{{}}/norm{i}")
        rows += naming.conv(f"{block}conv{i}", f"block{{}}/conv{i}", use_bias=False)
    return [
        *rows,
        *naming.conv(rf"{block}downsample\.conv", "block{}/downsample_conv", use_bias=False),
        *naming.affine("norm", "norm"),
        *naming.dense(r"head\.fc", "head", transform="flat"),
    ]


def _google() -> list[naming.Row]:
    """Kernels have our order of axes, and the head is a convolution of one pixel."""
    block, kernel = r"resnet/block(\d+)/unit(0[1-9]|[1-9]\d)/", "standardized_conv2d/kernel"
    rows = [(f"resnet/root_block/{kernel}", "params/stem/conv/kernel", "same")]
    for i, letter in enumerate("abc", 1):
        rows.append((f"{block}{letter}/{kernel}", f"params/block{{}}/conv{i}/kernel", "same"))
        rows += _google_norm(f"{block}{letter}/group_norm", f"block{{}}/norm{i}")
    return [
        *rows,
        (f"{block}a/proj/{kernel}", "params/block{}/downsample_conv/kernel", "same"),
        *_google_norm("resnet/group_norm", "norm"),
        ("resnet/head/conv2d/kernel", "params/head/kernel", "pixel"),
        ("resnet/head/conv2d/bias", "params/head/bias", "same"),
    ]


def _google_norm(source: str, target: str) -> list[naming.Row]:
    return [
        (f"{source}/gamma", f"params/{target}/scale", "same"),
        (f"{source}/beta", f"params/{target}/bias", "same"),
    ]
