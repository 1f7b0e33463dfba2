"""MobileNet v2 (Sandler et al. 2018) and v3 (Howard et al. 2019), as in torchvision and timm, and as in Keras."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from tljax.models import inverted, layers, naming
from tljax.models.chain import Chain
from tljax.models.inverted import Block


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published network: its blocks, channels of stem and top, of the dense layer before the head (v3; 0: none).

    torchvision's v3 and timm's are two networks: they differ in the epsilon and momentum of the norms. Keras' pad as
    TensorFlow does (`same`), the others symmetrically.
    """

    blocks: tuple[Block, ...]
    stem: int
    top: int
    hidden: int = 0
    act: str = "relu6"
    epsilon: float = 1e-5
    momentum: float = 0.9
    size: int = 224
    same: bool = False
    namings: tuple[str, ...] = ("torchvision", "timm")


def _v2(stem: int, *groups: tuple[int, int, int, int]) -> tuple[Block, ...]:
    """Blocks from the paper's table: expansion, channels, repeats, stride of the first."""
    found, channels = [], stem
    for expand, out, repeats, stride in groups:
        for i in range(repeats):
            found.append(Block(3, stride if not i else 1, channels * expand, out, expand != 1))
            channels = out
    return tuple(found)


def _v3(stem: int, *rows: tuple[int, int, int, int, str, int]) -> tuple[Block, ...]:
    """Blocks from the paper's tables: kernel, channels within, out, whether squeezed, activation, stride."""
    found, channels = [], stem
    for kernel, wide, out, squeezes, act, stride in rows:
        squeezed = inverted.rounded(wide // 4) if squeezes else 0
        act = {"RE": "relu", "HS": "hard_swish"}[act]
        found.append(
            Block(kernel, stride, wide, out, wide != channels, squeezed, act=act, se_gate="hard_sigmoid"),
        )
        channels = out
    return tuple(found)


_LARGE = Variant(
    _v3(
        16,
        (3, 16, 16, 0, "RE", 1),
        (3, 64, 24, 0, "RE", 2),
        (3, 72, 24, 0, "RE", 1),
        (5, 72, 40, 1, "RE", 2),
        (5, 120, 40, 1, "RE", 1),
        (5, 120, 40, 1, "RE", 1),
        (3, 240, 80, 0, "HS", 2),
        (3, 200, 80, 0, "HS", 1),
        (3, 184, 80, 0, "HS", 1),
        (3, 184, 80, 0, "HS", 1),
        (3, 480, 112, 1, "HS", 1),
        (3, 672, 112, 1, "HS", 1),
        (5, 672, 160, 1, "HS", 2),
        (5, 960, 160, 1, "HS", 1),
        (5, 960, 160, 1, "HS", 1),
    ),
    stem=16,
    top=960,
    hidden=1280,
    act="hard_swish",
    epsilon=1e-3,
    momentum=0.99,
    namings=("torchvision",),
)
_SMALL = dataclasses.replace(
    _LARGE,
    blocks=_v3(
        16,
        (3, 16, 16, 1, "RE", 2),
        (3, 72, 24, 0, "RE", 2),
        (3, 88, 24, 0, "RE", 1),
        (5, 96, 40, 1, "HS", 2),
        (5, 240, 40, 1, "HS", 1),
        (5, 240, 40, 1, "HS", 1),
        (5, 120, 48, 1, "HS", 1),
        (5, 144, 48, 1, "HS", 1),
        (5, 288, 96, 1, "HS", 2),
        (5, 576, 96, 1, "HS", 1),
        (5, 576, 96, 1, "HS", 1),
    ),
    top=576,
    hidden=1024,
)
_TIMM = {"epsilon": 1e-5, "momentum": 0.9, "namings": ("timm",)}

_KERAS = {"epsilon": 1e-3, "momentum": 0.999, "same": True, "namings": ("keras",)}
_V2 = Variant(
    _v2(
        32,
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ),
    stem=32,
    top=1280,
)

VARIANTS = {
    "mobilenet_v2": _V2,
    "mobilenet_v3_large": _LARGE,
    "mobilenet_v3_small": _SMALL,
    "mobilenetv3_large_100": dataclasses.replace(_LARGE, **_TIMM),
    "mobilenetv3_small_100": dataclasses.replace(_SMALL, **_TIMM),
    "keras_mobilenet_v2": dataclasses.replace(_V2, **_KERAS),
    "keras_mobilenet_v3_large": dataclasses.replace(_LARGE, **_KERAS),
    "keras_mobilenet_v3_small": dataclasses.replace(_SMALL, **_KERAS),
    # Not published: for tests.
    "mobilenet_v2_tiny": Variant(_v2(8, (1, 8, 1, 1), (2, 16, 2, 2), (2, 24, 1, 1)), stem=8, top=1280, size=32),
    "mobilenet_v3_tiny": dataclasses.replace(
        _LARGE,
        blocks=_v3(8, (3, 8, 8, 1, "RE", 1), (3, 24, 16, 0, "RE", 2), (5, 32, 16, 1, "HS", 1)),
        stem=8,
        top=96,
        hidden=48,
        size=32,
        namings=("torchvision", "timm"),
    ),
}


class PooledDense(nn.Module):
    """The mean over all pixels, a dense layer, and hard swish: what v3 has between its top and its head."""

    common: layers.Common
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, features]."""
        x = x.astype(jnp.float32).mean((1, 2))
        return jax.nn.hard_swish(layers.Dense(self.common, self.features, name="dense")(x))


class MobileNet(Chain):
    """Stages stem, block1, ..., top, hidden (v3), head."""

    variant: Variant = VARIANTS["mobilenet_v2"]

    @property
    def stages(self) -> tuple[str, ...]:
        """stem, block1, ..., blockN, top, head; v3 has hidden before its head."""
        hidden = ("hidden",) if self.variant.hidden else ()
        return ("stem", *(f"block{i}" for i in range(1, len(self.variant.blocks) + 1)), "top", *hidden, "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        v = self.variant
        common = layers.Common(self.dtype, self.param_dtype, self.axis_name, epsilon=v.epsilon, momentum=v.momentum)
        if name == "stem":
            return inverted.ConvNormAct(common, v.act, v.stem, size=3, stride=2, same=v.same, name=name)
        if name == "top":
            return inverted.ConvNormAct(common, v.act, v.top, same=v.same, name=name)
        if name == "hidden":
            return PooledDense(common, v.hidden, name=name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        i = int(name.removeprefix("block")) - 1
        return inverted.MBConv(common, v.blocks[i], v.same, self.drop_path_rate * i / len(v.blocks), name=name)


def create(name: str, **fields) -> MobileNet:
    """The network called `name`, with its own dropout where `fields` say nothing."""
    variant = VARIANTS[name]
    return MobileNet(variant=variant, **{"size": variant.size, "drop_rate": 0.2, **fields})


def conversion(name: str) -> dict[str, naming.Table]:
    """The tables for torchvision's state dicts, for timm's, and for Keras' weights."""
    variant = VARIANTS[name]
    return {source: _ROWS[source](variant) for source in variant.namings}


def _torchvision(v: Variant) -> naming.Table:
    blocks, top = list(enumerate(v.blocks, 1)), len(v.blocks) + 1
    if v.hidden:
        parts = {str(n): (f"block{n}", inverted.torchvision_parts(block)) for n, block in blocks}
        rows = inverted.part_rows(r"features\.(\d+)\.block\.", parts)
    else:
        # Of v2's blocks the first counts otherwise: there the third part is a norm.
        rows = []
        for numbers, some in ((r"1", blocks[:1]), (r"[2-9]|\d\d", blocks[1:])):
            parts = {str(n): (f"block{n}", _v2_parts(block)) for n, block in some}
            rows += inverted.part_rows(rf"features\.({numbers})\.conv\.", parts)
    return (
        *naming.conv_norm(r"features\.0\.0", r"features\.0\.1", "stem"),
        *rows,
        *naming.conv_norm(rf"features\.{top}\.0", rf"features\.{top}\.1", "top"),
        *(naming.dense(r"classifier\.0", "hidden/dense") if v.hidden else ()),
        *naming.dense(r"classifier\.3" if v.hidden else r"classifier\.1", "head"),
    )


def _v2_parts(block: Block) -> dict[str, str]:
    """v2's last convolution and norm lie beside the others, not in a list of their own."""
    j = int(block.expands)
    parts = {f"{j}.0": "depthwise_conv", f"{j}.1": "bn1", f"{j + 1}": "project_conv", f"{j + 2}": "bn2"}
    return ({"0.0": "expand_conv", "0.1": "bn0"} if block.expands else {}) | parts


def _timm(v: Variant) -> naming.Table:
    stages = inverted.timm_places(v.blocks)
    if v.hidden:
        # There the top counts as the last group, and the dense layer as a convolution of one pixel.
        stages[f"{inverted.places(v.blocks)[-1][0] + 1}.0"] = ("top", {"conv": "conv", "bn1": "bn"})
        rows = naming.dense("conv_head", "hidden/dense", transform="flat")
    else:
        rows = naming.conv_norm("conv_head", "bn2", "top")
    return (
        *naming.conv_norm("conv_stem", "bn1", "stem"),
        *inverted.part_rows(r"blocks\.(\d+\.\d+)\.", stages),
        *rows,
        *naming.dense("classifier", "head"),
    )


def _keras(v: Variant) -> naming.Table:
    if not v.hidden:
        parts = {"expand": "expand_conv", "depthwise": "depthwise_conv", "project": "project_conv"}
        parts |= {"expand_BN": "bn0", "depthwise_BN": "bn1", "project_BN": "bn2"}
        stages = {
            f"block_{n - 1}" if n > 1 else "expanded_conv": (f"block{n}", parts) for n in range(1, len(v.blocks) + 1)
        }
        return (
            *inverted.keras_rows(r"(expanded_conv|block_\d+)_", stages),
            *naming.keras_layer("Conv1", "stem/conv", use_bias=False),
            *naming.keras_batch_norm("bn_Conv1", "stem/bn"),
            *naming.keras_layer("Conv_1", "top/conv", use_bias=False),
            *naming.keras_batch_norm("Conv_1_bn", "top/bn"),
            *naming.keras_head(),
        )
    # As Keras 3 calls them, and as Keras 2 did: expanded_conv_1_depthwise_bn, expanded_conv_1/depthwise/BatchNorm.
    parts = {}
    for part, bn in (("expand", "bn0"), ("depthwise", "bn1"), ("project", "bn2")):
        parts |= {part: f"{part}_conv", f"{part}_bn": bn, f"{part}/BatchNorm": bn}
    for i, part in (("", "se_reduce"), ("_1", "se_expand")):
        parts |= {f"squeeze_excite_conv{i}": part, f"squeeze_excite/Conv{i}": part}
    stages = {str(n - 1) if n > 1 else None: (f"block{n}", parts) for n in range(1, len(v.blocks) + 1)}
    return (
        *inverted.keras_rows(r"expanded_conv(?:_(\d+))?[_/]", stages),
        *naming.keras_layer("[Cc]onv", "stem/conv", use_bias=False),
        *naming.keras_batch_norm("(?:conv_bn|Conv/BatchNorm)", "stem/bn"),
        *naming.keras_layer("[Cc]onv_1", "top/conv", use_bias=False),
        *naming.keras_batch_norm("(?:conv_1_bn|Conv_1/BatchNorm)", "top/bn"),
        *naming.keras_layer("[Cc]onv_2", "hidden/dense", transform="squeezed"),
        *naming.keras_head("squeezed"),
    )


_ROWS = {"torchvision": _torchvision, "timm": _timm, "keras": _keras}
