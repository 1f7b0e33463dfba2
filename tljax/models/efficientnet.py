"""EfficientNet B0-B7 (Tan & Le 2019), Lite 0-4 (its variants for mobile processors, 2020), V2 S-L (Tan & Le 2021).

Lite leaves out squeeze-excite, has ReLU6 for swish, and scales neither the widths of stem and top nor the
depths of the first and last group of blocks. The first groups of V2 are of fused blocks.
"""

import dataclasses
import math
from typing import NamedTuple

from flax import linen as nn

from tljax.models import inverted, layers, naming
from tljax.models.chain import Chain


class Group(NamedTuple):
    """So many blocks: their kernel size, the stride of the first, expansion, output channels, whether fused."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    out: int
    fused: bool = False


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published network: multipliers of width and depth, training size, dropout before the head.

    `same` is TensorFlow's padding; torchvision's V2, padded symmetrically, is another network than TensorFlow's.
    """

    width: float
    depth: float
    size: int
    drop_rate: float
    lite: bool = False
    groups: tuple[Group, ...] = (
        Group(1, 3, 1, 1, 16),
        Group(2, 3, 2, 6, 24),
        Group(2, 5, 2, 6, 40),
        Group(3, 3, 2, 6, 80),
        Group(3, 5, 1, 6, 112),
        Group(4, 5, 2, 6, 192),
        Group(1, 3, 1, 6, 320),
    )
    stem: int = 32
    top: int = 1280
    same: bool = True
    epsilon: float = 1e-3
    momentum: float = 0.99
    namings: tuple[str, ...] = ("efficientnet_pytorch", "keras")

    @property
    def act(self) -> str:
        """The activation, a function of jax.nn."""
        return "relu6" if self.lite else "silu"

    def scaled(self, channels: int) -> int:
        """Channels times the width, to a multiple of 8."""
        return inverted.rounded(channels * self.width)

    def ends(self) -> tuple[int, int]:
        """Channels of the stem and of the top."""
        return (self.stem, self.top) if self.lite else (self.scaled(self.stem), self.scaled(self.top))

    def blocks(self) -> tuple[inverted.Block, ...]:
        """All blocks in order, scaled; only the first of a group strides."""
        found, channels = [], self.ends()[0]
        for i, (repeats, kernel, stride, expand, out, fused) in enumerate(self.groups):
            if not (self.lite and i in (0, len(self.groups) - 1)):
                repeats = math.ceil(self.depth * repeats)
            for j in range(repeats):
                # A quarter of the block's input channels, not of the expanded ones.
                squeezed = 0 if self.lite or fused else max(1, channels // 4)
                block = inverted.Block(kernel, 1 if j else stride, channels * expand, self.scaled(out), expand != 1)
                found.append(block._replace(squeezed=squeezed, fused=fused, act=self.act, se_act=self.act))
                channels = self.scaled(out)
        return tuple(found)


_S = Variant(
    1.0,
    1.0,
    300,
    0.2,
    groups=(
        Group(2, 3, 1, 1, 24, fused=True),
        Group(4, 3, 2, 4, 48, fused=True),
        Group(4, 3, 2, 4, 64, fused=True),
        Group(6, 3, 2, 4, 128),
        Group(9, 3, 1, 6, 160),
        Group(15, 3, 2, 6, 256),
    ),
    stem=24,
    namings=("timm", "keras"),
)
_M = dataclasses.replace(
    _S,
    size=384,
    drop_rate=0.3,
    groups=(
        Group(3, 3, 1, 1, 24, fused=True),
        Group(5, 3, 2, 4, 48, fused=True),
        Group(5, 3, 2, 4, 80, fused=True),
        Group(7, 3, 2, 4, 160),
        Group(14, 3, 1, 6, 176),
        Group(18, 3, 2, 6, 304),
        Group(5, 3, 1, 6, 512),
    ),
)
_L = dataclasses.replace(
    _S,
    size=384,
    drop_rate=0.4,
    groups=(
        Group(4, 3, 1, 1, 32, fused=True),
        Group(7, 3, 2, 4, 64, fused=True),
        Group(7, 3, 2, 4, 96, fused=True),
        Group(10, 3, 2, 4, 192),
        Group(19, 3, 1, 6, 224),
        Group(25, 3, 2, 6, 384),
        Group(7, 3, 1, 6, 640),
    ),
    stem=32,
)
_TORCHVISION = {"same": False, "namings": ("torchvision",)}

_V1 = {
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
}

VARIANTS = {
    **_V1,
    # In timm the names without tf_ are those of other networks, with the same keys but symmetric padding.
    **{f"tf_{name}": dataclasses.replace(variant, namings=("timm",)) for name, variant in _V1.items()},
    # Those other networks, as timm itself has trained them.
    **{
        f"timm_{name}": dataclasses.replace(_V1[name], same=False, epsilon=1e-5, momentum=0.9, namings=("timm",))
        for name in (f"efficientnet_b{number}" for number in range(5))
    },
    # As TensorFlow has them, and as torchvision.
    **{f"tf_efficientnetv2_{letter}": variant for letter, variant in (("s", _S), ("m", _M), ("l", _L))},
    **{
        f"efficientnet_v2_{letter}": dataclasses.replace(variant, **_TORCHVISION)
        for letter, variant in (("s", _S), ("m", _M), ("l", _L))
    },
    # Not published: for tests.
    "efficientnet_tiny": Variant(
        1.0,
        1.0,
        32,
        0.2,
        groups=(Group(1, 3, 1, 1, 8), Group(2, 3, 2, 2, 16), Group(1, 5, 2, 2, 24)),
        stem=8,
        top=32,
        namings=("efficientnet_pytorch",),
    ),
    "efficientnetv2_tiny": Variant(
        1.0,
        1.0,
        32,
        0.2,
        groups=(Group(1, 3, 1, 1, 8, fused=True), Group(1, 3, 2, 2, 16, fused=True), Group(2, 3, 2, 2, 24)),
        stem=8,
        top=32,
        same=False,
        namings=("torchvision", "timm"),
    ),
}


class EfficientNet(Chain):
    """Stages stem, block1, ..., top, head; TensorFlow's SAME padding at the actual input size, mostly."""

    variant: Variant = VARIANTS["efficientnet_b0"]

    @property
    def stages(self) -> tuple[str, ...]:
        """stem, block1, ..., blockN, top, head."""
        return ("stem", *(f"block{i}" for i in range(1, len(self.variant.blocks()) + 1)), "top", "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        common = layers.Common(
            self.dtype, self.param_dtype, self.axis_name, epsilon=self.variant.epsilon, momentum=self.variant.momentum
        )
        v, (stem, top) = self.variant, self.variant.ends()
        if name == "stem":
            return inverted.ConvNormAct(common, v.act, stem, size=3, stride=2, same=v.same, name=name)
        if name == "top":
            return inverted.ConvNormAct(common, v.act, top, name=name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        blocks, i = v.blocks(), int(name.removeprefix("block")) - 1
        return inverted.MBConv(common, blocks[i], v.same, self.drop_path_rate * i / len(blocks), name=name)


def create(name: str, **fields) -> EfficientNet:
    """The network called `name`, with its own dropout and stochastic depth where `fields` say nothing."""
    variant = VARIANTS[name]
    defaults = {"size": variant.size, "drop_rate": variant.drop_rate, "drop_path_rate": 0.2}
    return EfficientNet(variant=variant, **{**defaults, **fields})


def conversion(name: str) -> dict[str, naming.Table]:
    """The tables for the packages efficientnet_pytorch and efficientnet_lite_pytorch, timm, torchvision and Keras."""
    variant = VARIANTS[name]
    return {source: _ROWS[source](variant) for source in variant.namings if not (variant.lite and source == "keras")}


def _efficientnet_pytorch(v: Variant) -> naming.Table:
    block = r"_blocks\.(\d+)\."
    rows = naming.conv_norm("_conv_stem", "_bn0", "stem")
    for conv in ("expand_conv", "depthwise_conv", "project_conv"):
        rows += naming.conv(f"{block}_{conv}", f"block{{}}/{conv}", use_bias=False)
    for bn in ("bn0", "bn1", "bn2"):
        rows += naming.batch_norm(f"{block}_{bn}", f"block{{}}/{bn}")
    if not v.lite:
        for conv in ("se_reduce", "se_expand"):
            rows += naming.conv(f"{block}_{conv}", f"block{{}}/{conv}")
    rows += naming.conv_norm("_conv_head", "_bn1", "top") + naming.dense("_fc", "head")
    return naming.table(rows, number=lambda match: int(match[1]) + 1)


def _timm(v: Variant) -> naming.Table:
    return (
        *naming.conv_norm("conv_stem", "bn1", "stem"),
        *inverted.part_rows(r"blocks\.(\d+\.\d+)\.", inverted.timm_places(v.blocks())),
        *naming.conv_norm("conv_head", "bn2", "top"),
        *naming.dense("classifier", "head"),
    )


def _torchvision(v: Variant) -> naming.Table:
    blocks, top = v.blocks(), len(v.groups) + 1
    stages = {
        f"{group + 1}.{i}": (f"block{n}", inverted.torchvision_parts(blocks[n - 1]))
        for n, (group, i) in enumerate(inverted.places(blocks), 1)
    }
    return (
        *naming.conv_norm(r"features\.0\.0", r"features\.0\.1", "stem"),
        *inverted.part_rows(r"features\.(\d+\.\d+)\.block\.", stages),
        *naming.conv_norm(rf"features\.{top}\.0", rf"features\.{top}\.1", "top"),
        *naming.dense(r"classifier\.1", "head"),
    )


def _keras(v: Variant) -> naming.Table:
    blocks = v.blocks()
    parts = {
        **{f"{part}_conv": f"{part}_conv" for part in ("expand", "project")},
        **{"expand_bn": "bn0", "bn": "bn1", "project_bn": "bn2", "se_reduce": "se_reduce", "se_expand": "se_expand"},
        **{"dwconv": "depthwise_conv", "dwconv2": "depthwise_conv"},
    }
    # block2a, block2b, …
    stages = {
        f"{group + 1}{chr(ord('a') + i)}": (f"block{n}", parts)
        for n, (group, i) in enumerate(inverted.places(blocks), 1)
    }
    return (
        *naming.keras_preprocessing(),
        *inverted.keras_rows(r"block(\d+[a-z])_", stages),
        *naming.keras_layer("stem_conv", "stem/conv", use_bias=False),
        *naming.keras_batch_norm("stem_bn", "stem/bn"),
        *naming.keras_layer("top_conv", "top/conv", use_bias=False),
        *naming.keras_batch_norm("top_bn", "top/bn"),
        *naming.keras_head(),
    )


_ROWS = {
    "efficientnet_pytorch": _efficientnet_pytorch,
    "timm": _timm,
    "torchvision": _torchvision,
    "keras": _keras,
}
