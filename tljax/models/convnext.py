"""ConvNeXt (Liu et al. 2022), the first version: LayerNorm, depthwise 7x7 convolutions, an MLP and layer scale."""

import dataclasses

import jax
from flax import linen as nn

from tljax.models import layers, naming
from tljax.models.chain import Chain
from tljax.models.vit import MLP, LayerScale


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published network: blocks in each of the levels, and their channels."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    size: int = 224
    layer_scale: float = 1e-6

    def blocks(self) -> tuple[tuple[int, bool], ...]:
        """(channels, whether it downsamples first) of each block: the first of a level does, but for the very first."""
        return tuple(
            (self.widths[level], level > 0 and i == 0) for level, depth in enumerate(self.depths) for i in range(depth)
        )


VARIANTS = {
    "convnext_tiny": Variant((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": Variant((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": Variant((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": Variant((3, 3, 27, 3), (192, 384, 768, 1536)),
    # Not published: for tests.
    "convnext_mini": Variant((1, 1, 2, 1), (8, 16, 24, 32), size=32),
}


def conv(common: layers.Common, features: int, size: int, stride: int, name: str, **more) -> layers.Conv:
    """A convolution with a bias, unpadded unless said otherwise."""
    fields = {"padding": 0, "use_bias": True, "kernel_init": layers.linear_init, **more}
    return layers.Conv(common, features, size, stride, name=name, **fields)


class Stem(nn.Module):
    """Patches of 4x4 pixels, each projected and normalised."""

    common: layers.Common
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, 3] -> [batch, height / 4, width / 4, features]."""
        return layers.norm(self.common, "norm")(conv(self.common, self.features, 4, 4, "conv")(x), live)


class Block(nn.Module):
    """Depthwise convolution, norm, MLP and layer scale beside a residual connection.

    The first block of a level halves height and width before that: a norm and a 2x2 convolution.
    """

    common: layers.Common
    features: int
    downsample: bool
    layer_scale: float
    drop_path_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, features]; raises UserError for an image too small."""
        c, n = self.common, self.features
        if self.downsample:
            layers.check_halves(x, self.name)
            x = conv(c, n, 2, 2, "downsample_conv")(layers.norm(c, "downsample_norm")(x, live))
        branch = conv(c, n, 7, 1, "depthwise_conv", padding=3, groups=n)(x)
        branch = MLP(c, name="mlp")(layers.norm(c, "norm")(branch, live))
        branch = LayerScale(c, self.layer_scale, name="layer_scale")(branch)
        if self.drop_path_rate and "/".join(self.path) in live:
            branch = layers.drop(self, branch, self.drop_path_rate, c.axis_name, whole=True)
        return x + branch


class ConvNeXt(Chain):
    """Stages stem, block1, ..., norm, head, the blocks numbered through all levels; the norm follows the pooling."""

    variant: Variant = VARIANTS["convnext_tiny"]

    @property
    def stages(self) -> tuple[str, ...]:
        """stem, block1, ..., blockN, norm, head."""
        return ("stem", *(f"block{i}" for i in range(1, sum(self.variant.depths) + 1)), "norm", "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        common = layers.Common(self.dtype, self.param_dtype, self.axis_name, norm="layer", epsilon=1e-6)
        if name == "stem":
            return Stem(common, self.variant.widths[0], name=name)
        if name == "norm":
            return layers.PooledNorm(common, name=name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        blocks, i = self.variant.blocks(), int(name.removeprefix("block")) - 1
        drop_path_rate = self.drop_path_rate * i / max(len(blocks) - 1, 1)
        return Block(common, *blocks[i], self.variant.layer_scale, drop_path_rate, name=name)


def create(name: str, **fields) -> ConvNeXt:
    """The network called `name`; without `fields` it drops nothing."""
    variant = VARIANTS[name]
    return ConvNeXt(variant=variant, **{"size": variant.size, **fields})


def conversion(name: str) -> dict[str, naming.Table]:
    """The tables for state dicts of timm, torchvision, Hugging Face transformers and the authors, and for Keras."""
    depths = VARIANTS[name].depths

    def numbered(rows, level):
        return naming.table(rows, lambda match: naming.number_of(depths, level(match), match))

    of_level = lambda match: int(match[1])
    # torchvision counts stem, blocks, downsampling, blocks, …: 1, 3, 5, 7 hold blocks, 2, 4, 6 downsample to them.
    return {
        "timm": numbered(_timm(), of_level),
        "torchvision": numbered(_torchvision(), lambda match: int(match[1]) // 2),
        "transformers": numbered(_transformers(), of_level),
        "facebook": numbered(_facebook(), of_level),
        # Keras counts what downsamples to a level from 0, as it does levels.
        "keras": numbered(_keras(), lambda match: int(match[1]) + (match.re.groups == 1)),
    }


def _rows(stem, down, block, dw, norm, fc1, fc2, gamma, last, head, scales="same") -> list[naming.Row]:
    """Rows by the sources of what all namings have; stem and down are those of a convolution and of a norm."""
    return [
        *naming.conv(stem[0], "stem/conv"),
        *naming.affine(stem[1], "stem/norm"),
        *naming.conv(down[0], "block{}/downsample_conv"),
        *naming.affine(down[1], "block{}/downsample_norm"),
        *naming.conv(block + dw, "block{}/depthwise_conv"),
        *naming.affine(block + norm, "block{}/norm"),
        *naming.dense(block + fc1, "block{}/mlp/fc1"),
        *naming.dense(block + fc2, "block{}/mlp/fc2"),
        (block + gamma, "params/block{}/layer_scale/gamma", scales),
        *naming.affine(last, "norm"),
        *naming.dense(head, "head"),
    ]


def _timm() -> list[naming.Row]:
    down, block = r"stages\.(\d+)\.downsample\.", r"stages\.(\d+)\.blocks\.(\d+)\."
    return _rows(
        (r"stem\.0", r"stem\.1"), (f"{down}1", f"{down}0"), block, "conv_dw", "norm", r"mlp\.fc1", r"mlp\.fc2", "gamma",
        r"head\.norm", r"head\.fc",
    )  # fmt: skip


def _torchvision() -> list[naming.Row]:
    down, block = r"features\.([246])\.", r"features\.([1357])\.(\d+)\."
    return _rows(
        (r"features\.0\.0", r"features\.0\.1"), (f"{down}1", f"{down}0"), block, r"block\.0", r"block\.2", r"block\.3",
        r"block\.5", "layer_scale", r"classifier\.0", r"classifier\.2", scales="vector",
    )  # fmt: skip


def _transformers() -> list[naming.Row]:
    model = r"(?:convnext\.)?"
    level = rf"{model}encoder\.stages\.(\d+)\."
    return _rows(
        (rf"{model}embeddings\.patch_embeddings", rf"{model}embeddings\.layernorm"),
        (rf"{level}downsampling_layer\.1", rf"{level}downsampling_layer\.0"), rf"{level}layers\.(\d+)\.",
        "dwconv", "layernorm", "pwconv1", "pwconv2", "layer_scale_parameter", rf"{model}layernorm", "classifier",
    )  # fmt: skip


def _facebook() -> list[naming.Row]:
    stem, down, block = r"downsample_layers\.0\.", r"downsample_layers\.([123])\.", r"stages\.(\d+)\.(\d+)\."
    return _rows(
        (f"{stem}0", f"{stem}1"), (f"{down}1", f"{down}0"), block, "dwconv", "norm", "pwconv1", "pwconv2", "gamma",
        "norm", "head",
    )  # fmt: skip


def _keras() -> list[naming.Row]:
    # convnext_tiny_stage_0_block_0_depthwise_conv: the model's name comes first.
    down, block = r"\w+_downsampling_{}_(\d+)", r"\w+_stage_(\d+)_block_(\d+)_"
    return [
        *naming.keras_preprocessing(),
        *naming.keras_layer(r"\w+_stem_conv", "stem/conv"),
        *naming.keras_norm(r"\w+_stem_layernorm", "stem/norm"),
        *naming.keras_layer(down.format("conv"), "block{}/downsample_conv"),
        *naming.keras_norm(down.format("layernorm"), "block{}/downsample_norm"),
        *naming.keras_layer(f"{block}depthwise_conv", "block{}/depthwise_conv"),
        *naming.keras_norm(f"{block}layernorm", "block{}/norm"),
        *naming.keras_layer(f"{block}pointwise_conv_1", "block{}/mlp/fc1"),
        *naming.keras_layer(f"{block}pointwise_conv_2", "block{}/mlp/fc2"),
        # Keras 3 gives this variable no name of its own.
        *naming.keras(f"{block}layer_scale", {r"(?:gamma|variable\w*)": ("params/block{}/layer_scale/gamma", "same")}),
        *naming.keras_norm(r"\w+_head_layernorm", "norm"),
        *naming.keras_layer(r"\w+_head_dense", "head"),
    ]
