"""Swin Transformer (Liu et al. 2021), the first version: attention within windows that shift every other block.

Images that windows do not fill are padded before the shift, as in torchvision, transformers and the authors' detectors;
timm shifts first, and narrows windows that are larger than the image.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tljax.models import layers, naming
from tljax.models.chain import Chain
from tljax.models.vit import MLP, Attention


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published network: channels of the first level, which each level doubles; blocks and heads of each level."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7  # tokens a side
    size: int = 224

    def blocks(self) -> tuple[tuple[int, int, bool, bool], ...]:
        """(channels, heads, whether it merges patches first, whether its windows shift) of each block."""
        return tuple(
            (self.width * 2**level, self.heads[level], level > 0 and i == 0, i % 2 == 1)
            for level, depth in enumerate(self.depths)
            for i in range(depth)
        )


_BASE, _LARGE = (128, (2, 2, 18, 2), (4, 8, 16, 32)), (192, (2, 2, 18, 2), (6, 12, 24, 48))

VARIANTS = {
    "swin_tiny": Variant(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": Variant(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": Variant(*_BASE),
    "swin_large": Variant(*_LARGE),
    "swin_base_window12": Variant(*_BASE, window=12, size=384),
    "swin_large_window12": Variant(*_LARGE, window=12, size=384),
    # Not published: for tests.
    "swin_mini": Variant(16, (2, 2), (2, 4), window=4, size=32),
}
PATCH = 4  # pixels a side


class Embed(nn.Module):
    """Patches of 4x4 pixels, each projected and normalised."""

    common: layers.Common
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, 3] -> [batch, height / 4, width / 4, width]."""
        x = layers.Conv(
            self.common, self.width, PATCH, PATCH, padding=0, use_bias=True, kernel_init=layers.linear_init,
            name="patch",
        )(x)  # fmt: skip
        return layers.norm(self.common, "norm")(x, live)


def partition(x, window: int):
    """[batch, height, width, channels] -> [batch, windows, tokens of a window, channels], row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels).swapaxes(2, 3)
    return x.reshape(batch, -1, window**2, channels)


def relative_index(window: int) -> np.ndarray:
    """[tokens, tokens]: the row of the table of biases for a query and a key, by how far apart they lie."""
    row, column = np.divmod(np.arange(window**2), window)
    apart = lambda place: place[:, None] - place[None, :] + window - 1
    return apart(row) * (2 * window - 1) + apart(column)


def shift_mask(height: int, width: int, window: int, shifts: tuple[int, int]) -> np.ndarray:
    """[windows, tokens, tokens]: -100 where query and key were no neighbours before the shift, else 0."""

    def part(length, shift):  # what came round the edge lies behind, within the last windows
        place = np.arange(length)
        return (place >= length - window).astype(int) + (place >= length - shift) if shift else np.zeros(length, int)

    parts = 3 * part(height, shifts[0])[:, None] + part(width, shifts[1])
    parts = partition(parts[None, ..., None], window)[0, ..., 0]
    return np.where(parts[:, :, None] != parts[:, None, :], np.float32(-100), np.float32(0))


class WindowAttention(Attention):
    """Self-attention within each window, with a learned bias for each distance: position_bias [distances, heads]."""

    window: int = 7
    shifted: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [batch, height, width, channels] -> the same."""
        c, w, (batch, height, width, channels) = self.common, self.window, x.shape
        x = jnp.pad(x, ((0, 0), (0, -height % w), (0, -width % w), (0, 0)))
        padded = x.shape[1:3]
        # One window alone has nothing to exchange with others.
        shifts = tuple(w // 2 if self.shifted and length > w else 0 for length in padded)
        table = self.param("position_bias", nn.initializers.normal(0.02), ((2 * w - 1) ** 2, self.heads), c.param_dtype)
        bias = table.astype(jnp.float32)[relative_index(w)].transpose(2, 0, 1)  # [heads, tokens, tokens]
        if any(shifts):
            x = jnp.roll(x, [-shift for shift in shifts], (1, 2))
            bias = bias + shift_mask(*padded, w, shifts)[:, None]
        x = self.attend(partition(x, w), bias)
        x = x.reshape(batch, padded[0] // w, padded[1] // w, w, w, channels).swapaxes(2, 3)
        x = jnp.roll(x.reshape(batch, *padded, channels), shifts, (1, 2))
        return x[:, :height, :width]


class Block(nn.Module):
    """Window attention and MLP, each behind a norm and beside a residual connection.

    The first block of a level merges each 2x2 tokens before that: their channels side by side, a norm, a linear map.
    """

    common: layers.Common
    features: int
    heads: int
    merges: bool
    shifted: bool
    window: int
    drop_path_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, features]."""
        c = self.common
        if self.merges:
            x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
            batch, height, width, inputs = x.shape
            x = x.reshape(batch, height // 2, 2, width // 2, 2, inputs).transpose(0, 1, 3, 4, 2, 5)
            x = layers.norm(c, "merge_norm")(x.reshape(batch, height // 2, width // 2, 4 * inputs), live)
            x = layers.Dense(c, self.features, use_bias=False, name="merge")(x)
        attn = WindowAttention(c, self.heads, True, window=self.window, shifted=self.shifted, name="attn")
        for i, layer in enumerate((attn, MLP(c, name="mlp")), 1):
            branch = layer(layers.norm(c, f"norm{i}")(x, live))
            if self.drop_path_rate and "/".join(self.path) in live:
                branch = layers.drop(self, branch, self.drop_path_rate, c.axis_name, whole=True)
            x = x + branch
        return x


class Swin(Chain):
    """Stages embed, block1, ..., norm, head, the blocks numbered through all levels; [batch, h, w, channels]."""

    variant: Variant = VARIANTS["swin_tiny"]

    @property
    def stages(self) -> tuple[str, ...]:
        """embed, block1, ..., blockN, norm, head."""
        return ("embed", *(f"block{i}" for i in range(1, sum(self.variant.depths) + 1)), "norm", "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        common = layers.Common(self.dtype, self.param_dtype, self.axis_name, norm="layer", epsilon=1e-5)
        if name == "embed":
            return Embed(common, self.variant.width, name=name)
        if name == "norm":
            return layers.norm(common, name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        blocks, i = self.variant.blocks(), int(name.removeprefix("block")) - 1
        drop_path_rate = self.drop_path_rate * i / max(len(blocks) - 1, 1)
        return Block(common, *blocks[i], self.variant.window, drop_path_rate, name=name)


def create(name: str, **fields) -> Swin:
    """The network called `name`; without `fields` it drops nothing."""
    variant = VARIANTS[name]
    return Swin(variant=variant, **{"size": variant.size, **fields})


def positions(name: str) -> dict[str, int]:
    """The tables of relative positions, which can be resized for windows of another size; all are of tokens."""
    return {f"block{i}/attn/position_bias": 0 for i in range(1, sum(VARIANTS[name].depths) + 1)}


def conversion(name: str) -> dict[str, naming.Table]:
    """The tables for state dicts of timm, torchvision, Hugging Face transformers and the authors (microsoft)."""
    depths = VARIANTS[name].depths
    numbered = lambda rows, level: naming.table(rows, lambda match: naming.number_of(depths, level(match), match))
    this, following, half = (lambda m: int(m[1])), (lambda m: int(m[1]) + 1), (lambda m: int(m[1]) // 2)
    merge = _merge(r"layers\.(\d+)\.downsample")
    return {
        "timm": numbered(_timm(r"head\.fc"), this) + numbered(merge, this),
        # Which counts patches, blocks, merging, blocks, …: 1, 3, 5, 7 hold blocks, 2, 4, 6 merge before them.
        "torchvision": numbered(_torchvision(), half) + numbered(_merge(r"features\.([246])"), half),
        # In these two the merging of patches ends a level, in the others it begins the next.
        "transformers": numbered(_transformers(), this)
        + numbered(_merge(rf"{_MODEL}encoder\.layers\.(\d+)\.downsample"), following),
        "microsoft": numbered(_timm("head"), this) + numbered(merge, following),
    }


_QKV = tuple(f"block{{}}/attn/{name}" for name in ("query", "key", "value"))
_OUT, _TABLE = "block{}/attn/out", "params/block{}/attn/position_bias"
_MODEL = r"(?:swin\.)?"  # before transformers' names, but for those of the network without its head
_FC1, _FC2 = "block{}/mlp/fc1", "block{}/mlp/fc2"
# What follows from the size of the windows: older files hold it.
_DERIVED = (r".*\.(?:relative_position_index|attn_mask)", None, "same")


def _merge(source: str) -> list[naming.Row]:
    return [
        *naming.affine(rf"{source}\.norm", "block{}/merge_norm"),
        (rf"{source}\.reduction\.weight", "params/block{}/merge/kernel", "linear"),
    ]


def _timm(head: str) -> list[naming.Row]:
    block = r"layers\.(\d+)\.blocks\.(\d+)\."
    return [
        *naming.conv(r"patch_embed\.proj", "embed/patch"),
        *naming.affine(r"patch_embed\.norm", "embed/norm"),
        *naming.affine(f"{block}norm1", "block{}/norm1"),
        *naming.dense(rf"{block}attn\.qkv", *_QKV),
        *naming.dense(rf"{block}attn\.proj", _OUT),
        (rf"{block}attn\.relative_position_bias_table", _TABLE, "same"),
        *naming.affine(f"{block}norm2", "block{}/norm2"),
        *naming.dense(rf"{block}mlp\.fc1", _FC1),
        *naming.dense(rf"{block}mlp\.fc2", _FC2),
        *naming.affine("norm", "norm"),
        *naming.dense(head, "head"),
        _DERIVED,
    ]


def _torchvision() -> list[naming.Row]:
    block = r"features\.([1357])\.(\d+)\."
    return [
        *naming.conv(r"features\.0\.0", "embed/patch"),
        *naming.affine(r"features\.0\.2", "embed/norm"),
        *naming.affine(f"{block}norm1", "block{}/norm1"),
        *naming.dense(rf"{block}attn\.qkv", *_QKV),
        *naming.dense(rf"{block}attn\.proj", _OUT),
        (rf"{block}attn\.relative_position_bias_table", _TABLE, "same"),
        *naming.affine(f"{block}norm2", "block{}/norm2"),
        *naming.dense(rf"{block}mlp\.0", _FC1),
        *naming.dense(rf"{block}mlp\.3", _FC2),
        *naming.affine("norm", "norm"),
        *naming.dense("head", "head"),
        (rf"{block}attn\.relative_position_index", None, "window_index"),
        (r".*\.attn_mask", None, "same"),
    ]


def _transformers() -> list[naming.Row]:
    """As its files have it (in memory, newer versions use other names)."""
    block = rf"{_MODEL}encoder\.layers\.(\d+)\.blocks\.(\d+)\."
    return [
        *naming.conv(rf"{_MODEL}embeddings\.patch_embeddings\.projection", "embed/patch"),
        *naming.affine(rf"{_MODEL}embeddings\.norm", "embed/norm"),
        *naming.affine(f"{block}layernorm_before", "block{}/norm1"),
        *(row for part in _QKV for row in naming.dense(rf"{block}attention\.self\.{part.split('/')[-1]}", part)),
        *naming.dense(rf"{block}attention\.output\.dense", _OUT),
        (rf"{block}attention\.self\.relative_position_bias_table", _TABLE, "same"),
        *naming.affine(f"{block}layernorm_after", "block{}/norm2"),
        *naming.dense(rf"{block}intermediate\.dense", _FC1),
        *naming.dense(rf"{block}output\.dense", _FC2),
        *naming.affine(rf"{_MODEL}layernorm", "norm"),
        *naming.dense("classifier", "head"),
        _DERIVED,
    ]
