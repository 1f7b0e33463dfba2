"""CLIP's Vision Transformers (Radford et al. 2021): the image tower as a chain of stages, the text tower beside it."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from tljax.models import layers, naming, vit
from tljax.models.chain import Chain

EPSILON = 1e-5
SCALE = 2.6592  # log(1 / 0.07), the initial logit_scale


@dataclasses.dataclass(frozen=True)
class Text:
    """A text tower: a causal transformer over numbered tokens."""

    width: int
    depth: int
    heads: int
    vocabulary: int = 49408
    context: int = 77  # tokens of a text, first and last included


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published pair of towers, which meet in embeddings of `dim` numbers."""

    image: vit.Variant
    text: Text
    dim: int

    @property
    def size(self) -> int:
        """Height and width of an image in pixels."""
        return self.image.size


def _variant(patch: int, image: tuple, text: tuple, dim: int, activation: str, size: int = 224) -> Variant:
    tower = vit.Variant(*image, patch=patch, size=size, embed_norm=True, activation=activation)
    return Variant(tower, Text(*text), dim)


_BASE, _LARGE = ((768, 12, 12), (512, 12, 8), 512), ((1024, 24, 16), (768, 12, 12), 768)

VARIANTS = {
    # OpenAI's, and those of others that were trained with its activation.
    "clip_vit_base_patch32": _variant(32, *_BASE, "quick_gelu"),
    "clip_vit_base_patch16": _variant(16, *_BASE, "quick_gelu"),
    "clip_vit_large_patch14": _variant(14, *_LARGE, "quick_gelu"),
    "clip_vit_large_patch14_336": _variant(14, *_LARGE, "quick_gelu", 336),
    # LAION's and DataComp's (Cherti et al. 2023; Gadre et al. 2023): the names of the arrays are the same.
    "clip_vit_base_patch32_laion": _variant(32, *_BASE, "gelu"),
    "clip_vit_base_patch16_laion": _variant(16, *_BASE, "gelu"),
    "clip_vit_large_patch14_laion": _variant(14, *_LARGE, "gelu"),
    "clip_vit_huge_patch14_laion": _variant(14, (1280, 32, 16), (1024, 24, 16), 1024, "gelu"),
    # Not published: for tests.
    "clip_vit_tiny": Variant(
        vit.Variant(32, 3, 2, patch=8, size=32, embed_norm=True, activation="quick_gelu"),
        Text(24, 2, 3, vocabulary=600, context=32),
        16,
    ),
}


class Projection(nn.Module):
    """The class token, normalised and projected to where texts are, as a vector of length one."""

    common: layers.Common
    dim: int

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, tokens, width] -> [batch, dim], float32."""
        x = layers.norm(self.common, "norm")(x[:, 0], live)
        return unit(layers.Dense(self.common, self.dim, use_bias=False, name="out")(x))


def unit(x: jax.Array) -> jax.Array:
    """Each vector over its length, float32. x: [..., dim]."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class CLIP(Chain):
    """The image tower. Stages embed, block1, ..., projection, head: logits are the head's, of unit vectors."""

    variant: Variant = VARIANTS["clip_vit_base_patch32"]

    @property
    def stages(self) -> tuple[str, ...]:
        """embed, block1, ..., blockN, projection, head."""
        return ("embed", *(f"block{i}" for i in range(1, self.variant.image.depth + 1)), "projection", "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        common = layers.Common(self.dtype, self.param_dtype, self.axis_name, norm="layer", epsilon=EPSILON)
        image = self.variant.image
        if name == "embed":
            return vit.Embed(common, image, name=name)
        if name == "projection":
            return Projection(common, self.variant.dim, name=name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        i = int(name.removeprefix("block")) - 1
        return vit.Block(common, image, self.drop_path_rate * i / max(image.depth - 1, 1), name=name)


class TextTower(nn.Module):
    """Texts as vectors of length one, and the factor by which CLIP multiplies their products with images' vectors.

    `end`: the token whose first place holds the text's vector; None: the token of the highest number, as OpenAI's
    model has it (in transformers: an `eos_token_id` of 2).
    """

    variant: Variant
    end: int | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """tokens: int [batch, context] -> ([batch, dim], scalar), float32."""
        text, dim = self.variant.text, self.variant.dim
        common = layers.Common(norm="layer", epsilon=EPSILON)
        block = vit.Variant(text.width, text.depth, text.heads, activation=self.variant.image.activation, causal=True)
        small, nothing = nn.initializers.normal(0.02), frozenset()
        table = self.param("token", small, (text.vocabulary, text.width))
        position = self.param("position", small, (text.context, text.width))
        scale = self.param("logit_scale", nn.initializers.constant(SCALE), ())
        x = table[tokens] + position[: tokens.shape[1]]
        for i in range(1, text.depth + 1):
            x = vit.Block(common, block, 0.0, name=f"block{i}")(x, nothing)
        x = layers.norm(common, "norm")(x, nothing)
        is_end = tokens if self.end is None else tokens == self.end
        x = x[jnp.arange(len(x)), jnp.argmax(is_end, axis=-1)]
        return unit(layers.Dense(common, dim, use_bias=False, name="projection")(x)), jnp.exp(scale)


def create(name: str, **fields) -> CLIP:
    """The image tower called `name`; without `fields` it drops nothing."""
    variant = VARIANTS[name]
    return CLIP(variant=variant, **{"size": variant.size, **fields})


def text_shapes(name: str) -> dict:
    """{"params": ...} of the text tower as nested dicts of ShapeDtypeStruct."""
    tower, tokens = TextTower(VARIANTS[name]), jnp.zeros((1, VARIANTS[name].text.context), jnp.int32)
    return jax.eval_shape(tower.init, jax.random.key(0), tokens)


def positions(name: str) -> dict[str, int]:
    """The position embeddings, and how many of them, the first, are of no patch."""
    return {"embed/position": 1}


def conversion(name: str) -> dict[str, naming.Table]:
    """The image tower's tables for the files of transformers, and for those of OpenAI and open_clip.

    The text tower's arrays are left out, knowingly. No CLIP has a head: the rows are for a fine-tuned one.
    """
    image, text = _transformers()
    theirs, their_text = _openai()
    head = naming.dense("head", "head")
    return _tables(image + head + _left_out(text), theirs + head + _left_out(their_text))


def text_conversion() -> dict[str, naming.Table]:
    """The same tables for the text tower, in which the image tower's arrays are left out."""
    image, text = _transformers()
    theirs, their_text = _openai()
    return _tables(text + _left_out(image), their_text + _left_out(theirs))


def _tables(transformers: list[naming.Row], openai: list[naming.Row]) -> dict[str, naming.Table]:
    number = lambda match: int(match[1]) + 1
    return {"transformers": naming.table(transformers, number), "openai": naming.table(openai, number)}


def _left_out(rows: list[naming.Row]) -> list[naming.Row]:
    return [(pattern, None, "same") for pattern, _, _ in rows]


_QKV = tuple(f"block{{}}/attn/{name}" for name in ("query", "key", "value"))


def _transformers() -> tuple[list[naming.Row], list[naming.Row]]:
    """Rows of the image tower and of the text tower."""

    def blocks(tower):
        block = rf"{tower}_model\.encoder\.layers\.(\d+)\."
        rows = [
            *naming.dense(rf"{block}self_attn\.out_proj", "block{}/attn/out"),
            *naming.dense(rf"{block}mlp\.fc1", "block{}/mlp/fc1"),
            *naming.dense(rf"{block}mlp\.fc2", "block{}/mlp/fc2"),
        ]
        for target, letter in zip(_QKV, "qkv"):
            rows += naming.dense(rf"{block}self_attn\.{letter}_proj", target)
        for i in (1, 2):
            rows += naming.affine(rf"{block}layer_norm{i}", f"block{{}}/norm{i}")
        # Files of older versions hold the numbers 0, 1, 2, …
        return [*rows, (rf"{tower}_model\.embeddings\.position_ids", None, "same")]

    embeddings = r"vision_model\.embeddings\."
    image = [
        (rf"{embeddings}class_embedding", "params/embed/class_token", "same"),
        (rf"{embeddings}patch_embedding\.weight", "params/embed/patch/kernel", "conv"),
        (rf"{embeddings}position_embedding\.weight", "params/embed/position", "same"),
        *naming.affine(r"vision_model\.pre_layrnorm", "embed/norm"),
        *blocks("vision"),
        *naming.affine(r"vision_model\.post_layernorm", "projection/norm"),
        (r"visual_projection\.weight", "params/projection/out/kernel", "linear"),
    ]
    text = [
        (r"text_model\.embeddings\.token_embedding\.weight", "params/token", "same"),
        (r"text_model\.embeddings\.position_embedding\.weight", "params/position", "same"),
        *blocks("text"),
        *naming.affine(r"text_model\.final_layer_norm", "norm"),
        (r"text_projection\.weight", "params/projection/kernel", "linear"),
        ("logit_scale", "params/logit_scale", "same"),
    ]
    return image, text


def _openai() -> tuple[list[naming.Row], list[naming.Row]]:
    """Rows of the image tower and of the text tower; newer open_clip files have "text." before the latter's names."""

    def blocks(tower):
        block = rf"{tower}transformer\.resblocks\.(\d+)\."
        rows = [
            *naming.dense(rf"{block}attn\.in_proj", *_QKV, weight="_weight", bias="_bias"),
            *naming.dense(rf"{block}attn\.out_proj", "block{}/attn/out"),
            *naming.dense(rf"{block}mlp\.c_fc", "block{}/mlp/fc1"),
            *naming.dense(rf"{block}mlp\.c_proj", "block{}/mlp/fc2"),
        ]
        for i in (1, 2):
            rows += naming.affine(rf"{block}ln_{i}", f"block{{}}/norm{i}")
        return [*rows, (rf"{block}attn_mask", None, "same")]

    image = [
        (r"visual\.class_embedding", "params/embed/class_token", "same"),
        (r"visual\.conv1\.weight", "params/embed/patch/kernel", "conv"),
        (r"visual\.positional_embedding", "params/embed/position", "same"),
        *naming.affine(r"visual\.ln_pre", "embed/norm"),
        *blocks(r"visual\."),
        *naming.affine(r"visual\.ln_post", "projection/norm"),
        (r"visual\.proj", "params/projection/out/kernel", "same"),  # [width, dim], unlike a layer's
    ]
    prefix = r"(?:text\.)?"
    text = [
        (rf"{prefix}token_embedding\.weight", "params/token", "same"),
        (rf"{prefix}positional_embedding", "params/position", "same"),
        *blocks(prefix),
        *naming.affine(rf"{prefix}ln_final", "norm"),
        (rf"{prefix}text_projection", "params/projection/kernel", "same"),
        ("logit_scale", "params/logit_scale", "same"),
        # In files of TorchScript, as OpenAI's are: what follows from the model.
        (rf"input_resolution|context_length|vocab_size|{prefix}attn_mask", None, "same"),
    ]
    return image, text
