"""VGG (Simonyan & Zisserman 2015), with and without batch normalisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tljax.models import layers, naming
from tljax.models.chain import Chain


@dataclasses.dataclass(frozen=True)
class Variant:
    """Channels of the convolutions of each block; channels and grid of the dense layers; whether it has norms.

    Keras' networks saw other images: 0 to 255 minus the mean, channels in the order of Caffe.
    """

    blocks: tuple[tuple[int, ...], ...]
    norms: bool
    hidden: int = 4096
    grid: int = 7
    size: int = 224
    keras: bool = False


def _blocks(*depths: int) -> tuple[tuple[int, ...], ...]:
    return tuple((channels,) * depth for channels, depth in zip((64, 128, 256, 512, 512), depths))


_DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}

VARIANTS = {
    **{name: Variant(_blocks(*depths), norms=False) for name, depths in _DEPTHS.items()},
    **{f"{name}_bn": Variant(_blocks(*depths), norms=True) for name, depths in _DEPTHS.items()},
    **{f"keras_{name}": Variant(_blocks(*_DEPTHS[name]), norms=False, keras=True) for name in ("vgg16", "vgg19")},
    # Not published: for tests.
    "vgg_tiny": Variant(((8,), (8, 16)), norms=False, hidden=32, size=32),
    "vgg_bn_tiny": Variant(((8,), (8, 16)), norms=True, hidden=32, size=32),
}


class Block(nn.Module):
    """3x3 convolutions with ReLU, and a 2x2 max pool."""

    common: layers.Common
    channels: tuple[int, ...]
    norms: bool

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, height // 2, width // 2, channels[-1]]."""
        for i, features in enumerate(self.channels, 1):
            x = layers.Conv(self.common, features, 3, padding=1, use_bias=True, name=f"conv{i}")(x)
            if self.norms:
                x = layers.norm(self.common, f"bn{i}")(x, live)
            x = jax.nn.relu(x)
        return nn.max_pool(x, (2, 2), (2, 2))


def averages(size: int, bins: int) -> np.ndarray:
    """[bins, size]: the mean over each of `bins` windows that cover `size` pixels, as PyTorch's adaptive pooling."""
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        start, stop = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


class Hidden(nn.Module):
    """A dense layer with ReLU; the first one takes what is left of the image, averaged to the grid."""

    common: layers.Common
    features: int
    grid: int
    drop_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] or [batch, in] -> [batch, features]."""
        if x.ndim == 4:
            rows, columns = (averages(size, self.grid) for size in x.shape[1:3])
            if x.shape[1:3] != (self.grid, self.grid):
                x = jnp.einsum("ih,bhwc,jw->bijc", rows, x.astype(jnp.float32), columns)
            # Channels first: the order in which the published kernels count.
            x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        x = jax.nn.relu(layers.Dense(self.common, self.features, name="dense")(x))
        if layers.drops(self.drop_rate) and "/".join(self.path) in live:
            x = layers.drop(self, x, self.drop_rate, self.common.axis_name)
        return x


class VGG(Chain):
    """Stages block1, ..., block5, hidden1, hidden2, head; features before the head are those of hidden2."""

    variant: Variant = VARIANTS["vgg16"]

    @property
    def stages(self) -> tuple[str, ...]:
        """block1, ..., blockN, hidden1, hidden2, head."""
        return (*(f"block{i}" for i in range(1, len(self.variant.blocks) + 1)), "hidden1", "hidden2", "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        common, v = layers.Common(self.dtype, self.param_dtype, self.axis_name), self.variant
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        if name.startswith("hidden"):
            # What is dropped behind the second layer, the head drops before its own.
            return Hidden(common, v.hidden, v.grid, self.drop_rate if name == "hidden1" else 0.0, name=name)
        return Block(common, v.blocks[int(name.removeprefix("block")) - 1], v.norms, name=name)


def create(name: str, **fields) -> VGG:
    """The network called `name`, with its own dropout where `fields` say nothing."""
    variant = VARIANTS[name]
    return VGG(variant=variant, **{"size": variant.size, "drop_rate": 0.5, **fields})


def conversion(name: str) -> dict[str, naming.Table]:
    """The tables for torchvision's state dicts and for timm's, where the dense layers are convolutions; for Keras."""
    if VARIANTS[name].keras:
        return {"keras": _keras()}
    conv, norm = {}, {}
    position = 0
    for number, channels in enumerate(VARIANTS[name].blocks, 1):
        for i in range(1, len(channels) + 1):
            conv[str(position)] = f"block{number}/conv{i}"
            norm[str(position + 1)] = f"block{number}/bn{i}"
            position += 3 if VARIANTS[name].norms else 2
        position += 1  # the pool
    convs = naming.table(naming.conv(rf"features\.({'|'.join(conv)})", "{}"), lambda match: conv[match[1]])
    if VARIANTS[name].norms:
        rows = naming.batch_norm(rf"features\.({'|'.join(norm)})", "{}")
        convs += naming.table(rows, lambda match: norm[match[1]])
    dense = {
        "torchvision": [
            *naming.dense(r"classifier\.0", "hidden1/dense"),
            *naming.dense(r"classifier\.3", "hidden2/dense"),
            *naming.dense(r"classifier\.6", "head"),
        ],
        "timm": [
            *naming.dense(r"pre_logits\.fc1", "hidden1/dense", transform=f"flat:{VARIANTS[name].grid}"),
            *naming.dense(r"pre_logits\.fc2", "hidden2/dense", transform="flat"),
            *naming.dense(r"head\.fc", "head"),
        ],
    }
    return {source: (*convs, *rows) for source, rows in dense.items()}


def _keras() -> naming.Table:
    convs = naming.keras_layer(r"block(\d+)_conv(\d+)", "{}")
    return (
        *naming.keras_layer("block1_conv1", "block1/conv1", transform="bgr"),
        *naming.table(convs, lambda match: f"block{match[1]}/conv{match[2]}"),
        # Keras flattens pixel after pixel, PyTorch channel after channel.
        *naming.keras_layer("fc1", "hidden1/dense", transform="rows_first:49"),
        *naming.keras_layer("fc2", "hidden2/dense"),
        *naming.keras_head(),
    )
