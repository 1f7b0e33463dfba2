"""Vision Transformer (Dosovitskiy et al. 2021), as DeiT, MAE and DINOv2 have it too: pre-norm, learned positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from tljax.errors import UserError
from tljax.models import layers, naming
from tljax.models.chain import Chain


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
    """Multi-head self-attention (Vaswani et al. 2017), the shares in float32."""

    common: layers.Common
    heads: int
    qkv_bias: bool
    causal: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., tokens, width] -> the same."""
        if not self.causal:
            return self.attend(x)
        earlier = jnp.tril(jnp.ones((x.shape[-2],) * 2, bool))
        return self.attend(x, jnp.where(earlier, 0, -jnp.inf))

    @nn.compact
    def attend(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """x: [..., tokens, width] -> the same; bias: added to the scores [..., heads, queries, keys]."""
        c, (*outer, tokens, width) = self.common, x.shape

        def project(name):  # -> [..., heads, tokens, width / heads]
            split = layers.Dense(c, width, self.qkv_bias, name=name)(x).reshape(*outer, tokens, self.heads, -1)
            return split.swapaxes(-3, -2)

        query, key, value = map(project, ("query", "key", "value"))
        query = query * (width // self.heads) ** -0.5
        scores = jnp.matmul(query, key.swapaxes(-2, -1), preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + bias
        x = jax.nn.softmax(scores).astype(c.dtype) @ value
        return layers.Dense(c, width, name="out")(x.swapaxes(-3, -2).reshape(*outer, tokens, width))


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


def create(name: str, **fields) -> ViT:
    """The network called `name`; without `fields` it drops nothing."""
    variant = VARIANTS[name]
    return ViT(variant=variant, **{"size": variant.size, **fields})


def positions(name: str) -> dict[str, int]:
    """The position embeddings, and how many of them, the first, are of no patch."""
    variant = VARIANTS[name]
    return {"embed/position": variant.prefix if variant.all_positions else 0}


def conversion(name: str) -> dict[str, naming.Table]:
    """The tables for timm's state dicts, for the files of Hugging Face transformers, and for torchvision's."""
    return tables(VARIANTS[name])


def tables(variant: Variant) -> dict[str, naming.Table]:
    """The conversion tables of a variant; only timm has a norm behind the pooling."""
    rows = {"timm": _timm("fc_norm" if variant.fc_norm else "norm")}
    if not variant.fc_norm:
        rows |= {"transformers": _transformers(), "torchvision": _torchvision()}
    return {source: naming.table(found, number=lambda match: int(match[1]) + 1) for source, found in rows.items()}


_QKV = tuple(f"block{{}}/attn/{name}" for name in ("query", "key", "value"))
_OUT, _FC1, _FC2 = "block{}/attn/out", "block{}/mlp/fc1", "block{}/mlp/fc2"


def _embed(patch: str, class_token: str, position: str) -> list[naming.Row]:
    return [
        (rf"{patch}\.weight", "params/embed/patch/kernel", "conv"),
        (rf"{patch}\.bias", "params/embed/patch/bias", "same"),
        (class_token, "params/embed/class_token", "squeezed"),
        (position, "params/embed/position", "squeezed"),
    ]


def _timm(norm: str) -> list[naming.Row]:
    block = r"blocks\.(\d+)\."
    rows = [
        *_embed(r"patch_embed\.proj", "cls_token", "pos_embed"),
        ("reg_token", "params/embed/registers", "squeezed"),
        *naming.dense(rf"{block}attn\.qkv", *_QKV),
        *naming.dense(rf"{block}attn\.proj", _OUT),
        *naming.dense(rf"{block}mlp\.fc1", _FC1),
        *naming.dense(rf"{block}mlp\.fc2", _FC2),
        *naming.affine(norm, "norm"),
        *naming.dense("head", "head"),
    ]
    for i in (1, 2):
        rows += naming.affine(rf"{block}norm{i}", f"block{{}}/norm{i}")
        rows.append((rf"{block}ls{i}\.gamma", f"params/block{{}}/layer_scale{i}/gamma", "same"))
    return rows


def _transformers() -> list[naming.Row]:
    """Of ViT and of DINOv2, as its files have it (in memory, newer versions use other names)."""
    model, block = r"(?:vit\.|dinov2\.)?", r"(?:vit\.|dinov2\.)?encoder\.layer\.(\d+)\."
    embeddings = rf"{model}embeddings\."
    rows = [
        *_embed(
            rf"{embeddings}patch_embeddings\.projection", rf"{embeddings}cls_token", rf"{embeddings}position_embeddings"
        ),
        (rf"{embeddings}mask_token", None, "same"),
        (rf"{model}pooler\..*", None, "same"),
        *naming.dense(rf"{block}attention\.output\.dense", _OUT),
        *naming.dense(rf"{block}(?:intermediate\.dense|mlp\.fc1)", _FC1),
        *naming.dense(rf"{block}(?:output\.dense|mlp\.fc2)", _FC2),
        *naming.affine(rf"{model}layernorm", "norm"),
        *naming.dense("classifier", "head"),
    ]
    for target in _QKV:
        rows += naming.dense(rf"{block}attention\.attention\.{target.split('/')[-1]}", target)
    for i, where in ((1, "before"), (2, "after")):
        rows += naming.affine(rf"{block}(?:layernorm_{where}|norm{i})", f"block{{}}/norm{i}")
        rows.append((rf"{block}layer_scale{i}\.lambda1", f"params/block{{}}/layer_scale{i}/gamma", "same"))
    return rows


def _torchvision() -> list[naming.Row]:
    block = r"encoder\.layers\.encoder_layer_(\d+)\."
    rows = [
        *_embed("conv_proj", "class_token", r"encoder\.pos_embedding"),
        *naming.dense(rf"{block}self_attention\.in_proj", *_QKV, weight="_weight", bias="_bias"),
        *naming.dense(rf"{block}self_attention\.out_proj", _OUT),
        # Older files call the layers linear_1 and linear_2.
        *naming.dense(rf"{block}mlp\.(?:0|linear_1)", _FC1),
        *naming.dense(rf"{block}mlp\.(?:3|linear_2)", _FC2),
        *naming.affine(r"encoder\.ln", "norm"),
        *naming.dense(r"heads\.head", "head"),
    ]
    for i in (1, 2):
        rows += naming.affine(rf"{block}ln_{i}", f"block{{}}/norm{i}")
    return rows
