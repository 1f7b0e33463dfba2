"""Vision Transformer (Dosovitskiy et al. 2021), as DeiT, MAE and DINOv2 have it too: pre-norm, learned positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from tljax.errors import UserError
from tljax.models import layers, naming
from tljax.models.attention import attend
from tljax.models.chain import Chain
from tljax.models.vit_tables import tables


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published network; the hidden layer of an MLP has four times the width."""

    width: int
    depth: int
    heads: int
    patch: int = 16
    size: int = 224
    class_token: bool = True
    registers: int = 0  # further tokens of no patch (Darcet et al. 2024)
    all_positions: bool = True  # whether the tokens of no patch have positions, too
    mean_pool: bool = False  # the head sees the mean of the patches, not the class token
    fc_norm: bool = False  # the last norm follows the pooling
    qkv_bias: bool = True
    layer_scale: float = 0.0  # initial value (Touvron et al. 2021, "Going deeper …"); 0: none
    embed_norm: bool = False  # a norm behind the positions, in place of the patches' bias, as CLIP has it
    activation: str = "gelu"  # a key of ACTIVATIONS
    causal: bool = False  # a token attends to itself and those before it only: text

    @property
    def prefix(self) -> int:
        """The number of tokens that come before those of the patches."""
        return self.class_token + self.registers

    def __post_init__(self):
        assert self.class_token or self.mean_pool, "a head needs a class token or the mean"
        assert self.mean_pool or not self.fc_norm, "only a mean is normalised after pooling"


ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # Hendrycks & Gimpel (2016)
}

_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
_PATCHES = {16: _SIZES, 32: ("small", "base", "large"), 14: ("large",)}
_DINOV2 = {"patch": 14, "size": 518, "layer_scale": 1e-5}

VARIANTS = {
    **{f"vit_{name}_patch{p}": Variant(*_SIZES[name], patch=p) for p, names in _PATCHES.items() for name in names},
    "vit_huge_patch14": Variant(1280, 32, 16, patch=14),
    "vit_medium_patch16_gap": Variant(
        512, 12, 8, size=256, class_token=False, mean_pool=True, qkv_bias=False, layer_scale=1e-6
    ),
    # As fine-tuned by He et al. (2022).
    "vit_base_patch16_mae": Variant(*_SIZES["base"], mean_pool=True, fc_norm=True),
    # Oquab et al. (2023), and with registers.
    **{f"vit_{name}_patch14_dinov2": Variant(*_SIZES[name], **_DINOV2) for name in ("small", "base", "large")},
    **{
        f"vit_{name}_patch14_reg4_dinov2": Variant(*_SIZES[name], **_DINOV2, registers=4, all_positions=False)
        for name in ("small", "base", "large")
    },
    # Not published: for tests. Six equal blocks.
    "vit_mini": Variant(32, 6, 2, patch=8, size=32),
}


class Embed(nn.Module):
    """Patches as tokens, behind the class token and the registers, plus learned positions."""

    common: layers.Common
    variant: Variant

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, 3] -> [batch, tokens, width]; raises UserError where patches do not fill it."""
        c, v = self.common, self.variant
        for pixels in x.shape[1:3]:
            if pixels % v.patch or not pixels:
                below = max(pixels // v.patch, 1) * v.patch
                nearest = f"{below} or {below + v.patch}" if pixels > v.patch else f"{v.patch}"
                raise UserError(f"{pixels} pixels are no whole number of patches of {v.patch}: nearest is {nearest}")
        x = layers.Conv(
            c, v.width, v.patch, v.patch, padding=0, use_bias=not v.embed_norm, kernel_init=layers.linear_init,
            name="patch",
        )(x)  # fmt: skip
        x = x.reshape(x.shape[0], -1, v.width)
        small = nn.initializers.normal(0.02)
        first = []
        if v.class_token:
            first.append(self.param("class_token", small, (v.width,), c.param_dtype)[None])
        if v.registers:
            first.append(self.param("registers", small, (v.registers, v.width), c.param_dtype))
        rows = x.shape[1] + (v.prefix if v.all_positions else 0)
        position = self.param("position", small, (rows, v.width), c.param_dtype).astype(c.dtype)
        if not v.all_positions:
            x = x + position
        first = [jnp.broadcast_to(token.astype(c.dtype), (x.shape[0], *token.shape)) for token in first]
        x = jnp.concatenate([*first, x], axis=1)
        x = x + position if v.all_positions else x
        return layers.norm(c, "norm")(x, live) if v.embed_norm else x


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017)."""

    common: layers.Common
    heads: int
    qkv_bias: bool
    causal: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., tokens, width] -> the same."""
        return self.attend(x)

    @nn.compact
    def attend(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x: [..., tokens, width] -> the same; bias: added to the scores [..., heads, queries, keys]."""
        c, (*outer, tokens, width) = self.common, x.shape

        def project(name):  # -> [..., tokens, heads, width / heads]
            return layers.Dense(c, width, self.qkv_bias, name=name)(x).reshape(*outer, tokens, self.heads, -1)

        x = attend(*map(project, ("query", "key", "value")), bias, self.causal)
        return layers.Dense(c, width, name="out")(x.reshape(*outer, tokens, width))


class MLP(nn.Module):
    """Two dense layers with a GELU between them."""

    common: layers.Common
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., width] -> [..., width]."""
        width = x.shape[-1]
        x = layers.Dense(self.common, 4 * width, name="fc1")(x)
        return layers.Dense(self.common, width, name="fc2")(ACTIVATIONS[self.activation](x))


class LayerScale(nn.Module):
    """A learned factor a channel at the end of a branch."""

    common: layers.Common
    start: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., channels]."""
        c = self.common
        return x * self.param("gamma", nn.initializers.constant(self.start), x.shape[-1:], c.param_dtype).astype(
            c.dtype
        )


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual connection."""

    common: layers.Common
    variant: Variant
    drop_path_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, tokens, width] -> [batch, tokens, width]."""
        c, v = self.common, self.variant
        attention = Attention(c, v.heads, v.qkv_bias, v.causal, name="attn")
        for i, layer in enumerate((attention, MLP(c, v.activation, name="mlp")), 1):
            branch = layer(layers.norm(c, f"norm{i}")(x, live))
            if v.layer_scale:
                branch = LayerScale(c, v.layer_scale, name=f"layer_scale{i}")(branch)
            if self.drop_path_rate and "/".join(self.path) in live:
                branch = layers.drop(self, branch, self.drop_path_rate, c.axis_name, whole=True)
            x = x + branch
        return x


class ViT(Chain):
    """Stages embed, block1, ..., norm, head; between them [batch, tokens, width]."""

    variant: Variant = VARIANTS["vit_base_patch16"]

    @property
    def stages(self) -> tuple[str, ...]:
        """embed, block1, ..., blockN, norm, head."""
        return ("embed", *(f"block{i}" for i in range(1, self.variant.depth + 1)), "norm", "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        common, v = (
            layers.Common(self.dtype, self.param_dtype, self.axis_name, norm="layer", epsilon=1e-6),
            self.variant,
        )
        if name == "embed":
            return Embed(common, v, name=name)
        if name == "norm":
            return layers.PooledNorm(common, v.prefix, name=name) if v.fc_norm else layers.norm(common, name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        i = int(name.removeprefix("block")) - 1
        return Block(common, v, self.drop_path_rate * i / max(v.depth - 1, 1), name=name)

    def pool(self, x: jax.Array) -> jax.Array:
        """The class token or the mean of the patches: [batch, tokens, width] -> [batch, width], float32."""
        x, v = x.astype(jnp.float32), self.variant
        if x.ndim == 2:  # pooled before the norm
            return x
        return x[:, v.prefix :].mean(1) if v.mean_pool else x[:, 0]


# Kernels that can be resized for patches of another size.
PATCHES = ("embed/patch/kernel",)


def create(name: str, **fields) -> ViT:
    """The network called `name`; without `fields` it drops nothing."""
    variant = VARIANTS[name]
    return ViT(variant=variant, **{"size": variant.size, **fields})


def positions(name: str) -> dict[str, int]:
    """The position embeddings, and how many of them, the first, are of no patch."""
    variant = VARIANTS[name]
    return {"embed/position": variant.prefix if variant.all_positions else 0}


def conversion(name: str) -> dict[str, naming.Table]:
    """The tables for timm's state dicts, the files of Hugging Face transformers, torchvision's, Google's .npz."""
    return tables(VARIANTS[name])
