"""ResNet (He et al. 2015) as v1.5 and v1, ResNeXt (Xie et al. 2017) and Wide ResNet (Zagoruyko & Komodakis 2016).

v1.5: a bottleneck strides in its 3x3 convolution, as in torchvision and timm. v1, as published and as in Keras: in its
first 1x1 convolution.
"""

import dataclasses

import jax
from flax import linen as nn

from tljax.models import layers, naming
from tljax.models.chain import Chain


@dataclasses.dataclass(frozen=True)
class Variant:
    """Blocks in each of the layers, whether they are bottlenecks, channels of the first layer.

    A bottleneck's 3x3 convolution is divided into `groups`; it has `wide` times the block's channels. In v1 its first
    convolution strides. Keras' convolutions are `biased`.
    """

    depths: tuple[int, ...]
    bottleneck: bool
    width: int = 64
    size: int = 224
    norm: str = "batch"
    groups: int = 1
    wide: float = 1.0
    v1: bool = False
    biased: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.9
    naming: str = "torchvision"

    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(channels, stride) of each block: a layer doubles the channels and, but for the first, strides."""
        return tuple(
            (self.width * 2**layer, 2 if layer and not i else 1)
            for layer, depth in enumerate(self.depths)
            for i in range(depth)
        )


_KERAS = {"bottleneck": True, "v1": True, "biased": True, "epsilon": 1.001e-5, "momentum": 0.99, "naming": "keras"}

VARIANTS = {
    "resnet18": Variant((2, 2, 2, 2), bottleneck=False),
    "resnet34": Variant((3, 4, 6, 3), bottleneck=False),
    "resnet50": Variant((3, 4, 6, 3), bottleneck=True),
    "resnet101": Variant((3, 4, 23, 3), bottleneck=True),
    "resnet152": Variant((3, 8, 36, 3), bottleneck=True),
    # So many groups of so many channels in the first layer.
    "resnext50_32x4d": Variant((3, 4, 6, 3), bottleneck=True, groups=32, wide=32 * 4 / 64),
    "resnext101_32x8d": Variant((3, 4, 23, 3), bottleneck=True, groups=32, wide=32 * 8 / 64),
    "resnext101_64x4d": Variant((3, 4, 23, 3), bottleneck=True, groups=64, wide=64 * 4 / 64),
    "wide_resnet50_2": Variant((3, 4, 6, 3), bottleneck=True, wide=2.0),
    "wide_resnet101_2": Variant((3, 4, 23, 3), bottleneck=True, wide=2.0),
    "keras_resnet50": Variant((3, 4, 6, 3), **_KERAS),
    "keras_resnet101": Variant((3, 4, 23, 3), **_KERAS),
    "keras_resnet152": Variant((3, 8, 36, 3), **_KERAS),
    # As Keras had it until 2019: another epsilon, other names.
    "keras_resnet50_old": Variant((3, 4, 6, 3), **(_KERAS | {"epsilon": 1e-3, "naming": "keras_old"})),
    # Not published: for tests.
    "resnet_tiny": Variant((1, 1, 1), bottleneck=True, width=8, size=32),
    "resnext_tiny": Variant((1, 1, 1), bottleneck=True, width=8, size=32, groups=4, wide=2.0),
    "keras_resnet_tiny": Variant((1, 1), size=32, **_KERAS),
    "groupnorm_tiny": Variant((1, 1, 1), bottleneck=False, width=8, size=32, norm="group"),
}


class Stem(nn.Module):
    """7x7 convolution, normalisation, ReLU, 3x3 max pool: a quarter of the height and width."""

    common: layers.Common
    features: int
    biased: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, 3] -> [batch, height / 4, width / 4, features]."""
        x = layers.Conv(self.common, self.features, 7, 2, padding=3, use_bias=self.biased, name="conv1")(x)
        x = jax.nn.relu(layers.norm(self.common, "bn1")(x, live))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class Block(nn.Module):
    """Residual block: two 3x3 convolutions or, as a bottleneck, 1x1, 3x3, and 1x1 to 4 times the channels."""

    common: layers.Common
    channels: int
    stride: int
    bottleneck: bool
    drop_path_rate: float
    groups: int = 1
    wide: float = 1.0
    v1: bool = False
    biased: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, channels, or 4 * channels]."""
        c, n, inputs = self.common, self.channels, x
        out = 4 * n if self.bottleneck else n
        if self.bottleneck:
            within = int(n * self.wide)
            first, second = (self.stride, 1) if self.v1 else (1, self.stride)
            convs = ((within, 1, first, 1), (within, 3, second, self.groups), (out, 1, 1, 1))
        else:
            convs = ((n, 3, self.stride, 1), (n, 3, 1, 1))
        for i, (features, size, stride, groups) in enumerate(convs, 1):
            x = jax.nn.relu(x) if i > 1 else x
            x = layers.Conv(c, features, size, stride, size // 2, groups, self.biased, name=f"conv{i}")(x)
            x = layers.norm(c, f"bn{i}")(x, live)
        if inputs.shape[-1] != out or self.stride != 1:
            inputs = layers.Conv(c, out, 1, self.stride, 0, use_bias=self.biased, name="downsample_conv")(inputs)
            inputs = layers.norm(c, "downsample_bn")(inputs, live)
        if self.drop_path_rate and "/".join(self.path) in live:
            x = layers.drop(self, x, self.drop_path_rate, c.axis_name, whole=True)
        return jax.nn.relu(x + inputs)


class ResNet(Chain):
    """Stages stem, block1, ..., head, the blocks numbered through all layers; symmetric padding."""

    variant: Variant = VARIANTS["resnet50"]

    @property
    def stages(self) -> tuple[str, ...]:
        """stem, block1, ..., blockN, head."""
        return ("stem", *(f"block{i}" for i in range(1, sum(self.variant.depths) + 1)), "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        v = self.variant
        common = layers.Common(
            self.dtype, self.param_dtype, self.axis_name, norm=v.norm, epsilon=v.epsilon, momentum=v.momentum
        )
        if name == "stem":
            return Stem(common, v.width, v.biased, name=name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        blocks, i = v.blocks(), int(name.removeprefix("block")) - 1
        channels, stride = blocks[i]
        drop_path_rate = self.drop_path_rate * i / len(blocks)
        fields = (v.groups, v.wide, v.v1, v.biased)
        return Block(common, channels, stride, v.bottleneck, drop_path_rate, *fields, name=name)


def create(name: str, **fields) -> ResNet:
    """The network called `name`; without `fields` it drops nothing, as published."""
    variant = VARIANTS[name]
    return ResNet(variant=variant, **{"size": variant.size, **fields})


def conversion(name: str) -> dict[str, naming.Table]:
    """The table for torchvision's and timm's state dicts, or for Keras' weights."""
    variant = VARIANTS[name]
    table = _ROWS[variant.naming](variant)
    return {"torchvision": table, "timm": table} if variant.naming == "torchvision" else {variant.naming: table}


def _torchvision(v: Variant) -> naming.Table:
    block = r"layer(\d+)\.(\d+)\."
    rows = [(r"conv1\.weight", "params/stem/conv1/kernel", "conv"), *naming.batch_norm("bn1", "stem/bn1")]
    for i in (1, 2, 3) if v.bottleneck else (1, 2):
        rows.append((rf"{block}conv{i}\.weight", f"params/block{{}}/conv{i}/kernel", "conv"))
        rows += naming.batch_norm(f"{block}bn{i}", f"block{{}}/bn{i}")
    rows += [
        (rf"{block}downsample\.0\.weight", "params/block{}/downsample_conv/kernel", "conv"),
        *naming.batch_norm(rf"{block}downsample\.1", "block{}/downsample_bn"),
        (r"fc\.weight", "params/head/kernel", "linear"),
        (r"fc\.bias", "params/head/bias", "same"),
    ]
    # Blocks are numbered anew in each layer.
    return naming.table(rows, lambda match: naming.number_of(v.depths, int(match[1]) - 1, match))


def _keras(v: Variant) -> naming.Table:
    # conv2_block1_1_conv, conv2_block1_0_conv beside it
    names = lambda kind: rf"conv(\d+)_block(\d+)_{{}}_{kind}"
    rows = [
        *naming.keras_layer("conv1_conv", "stem/conv1", transform="bgr"),
        *naming.keras_batch_norm("conv1_bn", "stem/bn1"),
    ]
    rows += _keras_blocks(names("conv"), names("bn"), ("1", "2", "3", "0")) + naming.keras_head()
    return naming.table(rows, lambda match: sum(v.depths[: int(match[1]) - 2]) + int(match[2]))


def _keras_old(v: Variant) -> naming.Table:
    # res2a_branch2a and bn2a_branch2a, res2a_branch1 beside it
    names = lambda kind: rf"{kind}(\d)([a-z])_branch{{}}"
    rows = [
        *naming.keras_layer("conv1", "stem/conv1", transform="bgr"),
        *naming.keras_batch_norm("bn_conv1", "stem/bn1"),
    ]
    rows += _keras_blocks(names("res"), names("bn"), ("2a", "2b", "2c", "1")) + naming.keras_head()
    return naming.table(rows, lambda match: sum(v.depths[: int(match[1]) - 2]) + ord(match[2]) - ord("a") + 1)


def _keras_blocks(conv: str, bn: str, parts: tuple[str, ...]) -> list[naming.Row]:
    rows = []
    for part, (our_conv, our_bn) in zip(
        parts, [*((f"conv{i}", f"bn{i}") for i in (1, 2, 3)), ("downsample_conv", "downsample_bn")]
    ):
        rows += naming.keras_layer(conv.format(part), f"block{{}}/{our_conv}")
        rows += naming.keras_batch_norm(bn.format(part), f"block{{}}/{our_bn}")
    return rows


_ROWS = {"torchvision": _torchvision, "keras": _keras, "keras_old": _keras_old}
