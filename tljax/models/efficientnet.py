"""EfficientNet B0-B7 (Tan & Le 2019) and EfficientNet-Lite 0-4 (its variants for mobile processors, 2020).

Lite leaves out squeeze-excite, has ReLU6 for swish, and scales neither the widths of stem and top nor the
depths of the first and last group of blocks.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
from flax import linen as nn

from tljax.models import layers, naming
from tljax.models.chain import Chain


class Block(NamedTuple):
    """One inverted residual block: kernel size, stride, expansion, output channels."""

    kernel: int
    stride: int
    expand: int
    out: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published network: multipliers of width and depth, training size, dropout before the head."""

    width: float
    depth: float
    size: int
    drop_rate: float
    lite: bool = False
    groups: tuple[tuple[int, Block], ...] = (
        (1, Block(3, 1, 1, 16)),
        (2, Block(3, 2, 6, 24)),
        (2, Block(5, 2, 6, 40)),
        (3, Block(3, 2, 6, 80)),
        (3, Block(5, 1, 6, 112)),
        (4, Block(5, 2, 6, 192)),
        (1, Block(3, 1, 6, 320)),
    )
    stem: int = 32
    top: int = 1280

    def scaled(self, channels: int) -> int:
        """Channels times the width, to the nearest multiple of 8 that does not lose more than a tenth."""
        wide = channels * self.width
        nearest = max(8, int(wide + 4) // 8 * 8)
        return nearest + 8 if nearest < 0.9 * wide else nearest

    def ends(self) -> tuple[int, int]:
        """Channels of the stem and of the top."""
        return (self.stem, self.top) if self.lite else (self.scaled(self.stem), self.scaled(self.top))

    def blocks(self) -> tuple[Block, ...]:
        """All blocks in order, scaled; only the first of a group strides."""
        found = []
        for i, (repeats, block) in enumerate(self.groups):
            if not (self.lite and i in (0, len(self.groups) - 1)):
                repeats = math.ceil(self.depth * repeats)
            block = block._replace(out=self.scaled(block.out))
            found += [block] + [block._replace(stride=1)] * (repeats - 1)
        return tuple(found)


VARIANTS = {
    "efficientnet_lite0": Variant(1.0, 1.0, 224, 0.2, lite=True),
    "efficientnet_lite1": Variant(1.0, 1.1, 240, 0.2, lite=True),
    "efficientnet_lite2": Variant(1.1, 1.2, 260, 0.3, lite=True),
    "efficientnet_lite3": Variant(1.2, 1.4, 280, 0.3, lite=True),
    "efficientnet_lite4": Variant(1.4, 1.8, 300, 0.3, lite=True),
    "efficientnet_b0": Variant(1.0, 1.0, 224, 0.2),
    "efficientnet_b1": Variant(1.0, 1.1, 240, 0.2),
    "efficientnet_b2": Variant(1.1, 1.2, 260, 0.3),
    "efficientnet_b3": Variant(1.2, 1.4, 300, 0.3),
    "efficientnet_b4": Variant(1.4, 1.8, 380, 0.4),
    "efficientnet_b5": Variant(1.6, 2.2, 456, 0.4),
    "efficientnet_b6": Variant(1.8, 2.6, 528, 0.5),
    "efficientnet_b7": Variant(2.0, 3.1, 600, 0.5),
    # Not published: for tests.
    "efficientnet_tiny": Variant(
        1.0,
        1.0,
        32,
        0.2,
        groups=((1, Block(3, 1, 1, 8)), (2, Block(3, 2, 2, 16)), (1, Block(5, 2, 2, 24))),
        stem=8,
        top=32,
    ),
}


class ConvNormAct(nn.Module):
    """The stem and the top: convolution, normalisation, activation."""

    common: layers.Common
    act: str
    features: int
    size: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, features]."""
        x = layers.Conv(self.common, self.features, self.size, self.stride, name="conv")(x)
        return getattr(jax.nn, self.act)(layers.norm(self.common, "bn")(x, live))


class MBConv(nn.Module):
    """Inverted residual block (Sandler et al. 2018), with squeeze-excite (Hu et al. 2018) unless `lite`."""

    common: layers.Common
    block: Block
    lite: bool
    drop_path_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, block.out]."""
        common, block, inputs, channels = self.common, self.block, x, x.shape[-1]
        act = jax.nn.relu6 if self.lite else jax.nn.silu
        wide = channels * block.expand
        if block.expand != 1:
            x = layers.Conv(common, wide, name="expand_conv")(x)
            x = act(layers.norm(common, "bn0")(x, live))
        x = layers.Conv(common, wide, block.kernel, block.stride, groups=wide, name="depthwise_conv")(x)
        x = act(layers.norm(common, "bn1")(x, live))
        if not self.lite:
            # A quarter of the block's input channels, not of the expanded ones.
            squeezed = max(1, channels // 4)
            gate = x.mean((1, 2), keepdims=True)
            gate = act(layers.Conv(common, squeezed, use_bias=True, name="se_reduce")(gate))
            x = x * jax.nn.sigmoid(layers.Conv(common, wide, use_bias=True, name="se_expand")(gate))
        x = layers.Conv(common, block.out, name="project_conv")(x)
        x = layers.norm(common, "bn2")(x, live)
        if block.stride == 1 and channels == block.out:
            if self.drop_path_rate and "/".join(self.path) in live:
                x = layers.drop(self, x, self.drop_path_rate, common.axis_name, whole=True)
            x = x + inputs
        return x


class EfficientNet(Chain):
    """Stages stem, block1, ..., top, head; TensorFlow's SAME padding at the actual input size."""

    variant: Variant = VARIANTS["efficientnet_b0"]

    @property
    def stages(self) -> tuple[str, ...]:
        """stem, block1, ..., blockN, top, head."""
        return ("stem", *(f"block{i}" for i in range(1, len(self.variant.blocks()) + 1)), "top", "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        common = layers.Common(self.dtype, self.param_dtype, self.axis_name, epsilon=1e-3, momentum=0.99)
        act = "relu6" if self.variant.lite else "silu"
        stem, top = self.variant.ends()
        if name == "stem":
            return ConvNormAct(common, act, stem, size=3, stride=2, name=name)
        if name == "top":
            return ConvNormAct(common, act, top, name=name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        blocks, i = self.variant.blocks(), int(name.removeprefix("block")) - 1
        return MBConv(common, blocks[i], self.variant.lite, self.drop_path_rate * i / len(blocks), name=name)


def create(name: str, **fields) -> EfficientNet:
    """The network called `name`, with its own dropout and stochastic depth where `fields` say nothing."""
    variant = VARIANTS[name]
    defaults = {"size": variant.size, "drop_rate": variant.drop_rate, "drop_path_rate": 0.2}
    return EfficientNet(variant=variant, **{**defaults, **fields})


def conversion(name: str) -> dict[str, naming.Table]:
    """The table for the state dicts of the packages efficientnet_pytorch and efficientnet_lite_pytorch."""
    block = r"_blocks\.(\d+)\."
    rows = [(r"_conv_stem\.weight", "params/stem/conv/kernel", "conv"), *naming.batch_norm("_bn0", "stem/bn")]
    for conv in ("expand_conv", "depthwise_conv", "project_conv"):
        rows.append((rf"{block}_{conv}\.weight", f"params/block{{}}/{conv}/kernel", "conv"))
    for bn in ("bn0", "bn1", "bn2"):
        rows += naming.batch_norm(f"{block}_{bn}", f"block{{}}/{bn}")
    if not VARIANTS[name].lite:
        for conv in ("se_reduce", "se_expand"):
            rows.append((rf"{block}_{conv}\.weight", f"params/block{{}}/{conv}/kernel", "conv"))
            rows.append((rf"{block}_{conv}\.bias", f"params/block{{}}/{conv}/bias", "same"))
    rows += [
        (r"_conv_head\.weight", "params/top/conv/kernel", "conv"),
        *naming.batch_norm("_bn1", "top/bn"),
        (r"_fc\.weight", "params/head/kernel", "linear"),
        (r"_fc\.bias", "params/head/bias", "same"),
    ]
    return {"efficientnet_pytorch": naming.table(rows, number=lambda match: int(match[1]) + 1)}
