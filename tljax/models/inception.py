"""Inception-v3 (Szegedy et al. 2016) as torchvision and timm have it, and as Keras."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn

from tljax.models import layers, naming
from tljax.models.chain import Chain

Conv = tuple[str, int, int | tuple[int, int], int, bool]  # name, channels, size, stride, whether padded
Branch = tuple[Conv | str | tuple[Conv, ...], ...]  # in order; "max" and "average" pool, a tuple forks and joins


@dataclasses.dataclass(frozen=True)
class Variant:
    """One network: a divisor of all widths, and whether it has the auxiliary head.

    Keras' averages leave the padding out, and its norms have no scale.
    """

    auxiliary: bool = False
    divisor: int = 1
    size: int = 299
    keras: bool = False


VARIANTS = {
    "inception_v3": Variant(),
    "inception_v3_aux": Variant(auxiliary=True),
    "keras_inception_v3": Variant(keras=True),
    # Not published: for tests.
    "inception_tiny": Variant(divisor=16, size=96),
}


def _a(pooled: int) -> tuple[Branch, ...]:
    return (
        (("branch1x1", 64, 1, 1, True),),
        (("branch5x5_1", 48, 1, 1, True), ("branch5x5_2", 64, 5, 1, True)),
        (
            ("branch3x3dbl_1", 64, 1, 1, True),
            ("branch3x3dbl_2", 96, 3, 1, True),
            ("branch3x3dbl_3", 96, 3, 1, True),
        ),
        ("average", ("branch_pool", pooled, 1, 1, True)),
    )


def _c(within: int) -> tuple[Branch, ...]:
    wide, high = (1, 7), (7, 1)
    return (
        (("branch1x1", 192, 1, 1, True),),
        (
            ("branch7x7_1", within, 1, 1, True),
            ("branch7x7_2", within, wide, 1, True),
            ("branch7x7_3", 192, high, 1, True),
        ),
        (
            ("branch7x7dbl_1", within, 1, 1, True),
            ("branch7x7dbl_2", within, high, 1, True),
            ("branch7x7dbl_3", within, wide, 1, True),
            ("branch7x7dbl_4", within, high, 1, True),
            ("branch7x7dbl_5", 192, wide, 1, True),
        ),
        ("average", ("branch_pool", 192, 1, 1, True)),
    )


_B = (
    (("branch3x3", 384, 3, 2, False),),
    (("branch3x3dbl_1", 64, 1, 1, True), ("branch3x3dbl_2", 96, 3, 1, True), ("branch3x3dbl_3", 96, 3, 2, False)),
    ("max",),
)
_D = (
    (("branch3x3_1", 192, 1, 1, True), ("branch3x3_2", 320, 3, 2, False)),
    (
        ("branch7x7x3_1", 192, 1, 1, True),
        ("branch7x7x3_2", 192, (1, 7), 1, True),
        ("branch7x7x3_3", 192, (7, 1), 1, True),
        ("branch7x7x3_4", 192, 3, 2, False),
    ),
    ("max",),
)
_E = (
    (("branch1x1", 320, 1, 1, True),),
    (
        ("branch3x3_1", 384, 1, 1, True),
        (("branch3x3_2a", 384, (1, 3), 1, True), ("branch3x3_2b", 384, (3, 1), 1, True)),
    ),
    (
        ("branch3x3dbl_1", 448, 1, 1, True),
        ("branch3x3dbl_2", 384, 3, 1, True),
        (("branch3x3dbl_3a", 384, (1, 3), 1, True), ("branch3x3dbl_3b", 384, (3, 1), 1, True)),
    ),
    ("average", ("branch_pool", 192, 1, 1, True)),
)
# The published names of our blocks, and what is in them.
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "5b": _a(32),
    "5c": _a(64),
    "5d": _a(64),
    "6a": _B,
    "6b": _c(128),
    "6c": _c(160),
    "6d": _c(160),
    "6e": _c(192),
    "7a": _D,
    "7b": _E,
    "7c": _E,
}
AUXILIARY = "block8"  # what the auxiliary head looks at: 6e
STEM: dict[str, Conv | str] = {
    "1a_3x3": ("conv1", 32, 3, 2, False),
    "2a_3x3": ("conv2", 32, 3, 1, False),
    "2b_3x3": ("conv3", 64, 3, 1, True),
    "pool1": "max",
    "3b_1x1": ("conv4", 80, 1, 1, False),
    "4a_3x3": ("conv5", 192, 3, 1, False),
    "pool2": "max",
}


class ConvNorm(nn.Module):
    """Convolution, normalisation, ReLU."""

    common: layers.Common
    features: int
    size: int | tuple[int, int]
    stride: int = 1
    padded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, features]."""
        size = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        padding = tuple(n // 2 for n in size) if self.padded else 0
        x = layers.Conv(self.common, self.features, size, self.stride, padding, name="conv")(x)
        return jax.nn.relu(layers.norm(self.common, "bn")(x, live))


class Branches(nn.Module):
    """Branches beside each other, their channels joined."""

    common: layers.Common
    branches: tuple[Branch, ...]
    divisor: int = 1
    padding_counts: bool = True  # in averages

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, sum of the branches' channels]."""
        return self.joined(x, live)

    def joined(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """All branches."""
        return jnp.concatenate([self.along(branch, x, live) for branch in self.branches], axis=-1)

    def along(self, branch: Iterable, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """One branch: layer after layer."""
        for layer in branch:
            if layer == "max":
                x = nn.max_pool(x, (3, 3), (2, 2))
            elif layer == "average":
                x = nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), self.padding_counts)
            elif isinstance(layer[0], tuple):
                x = jnp.concatenate([self.along((fork,), x, live) for fork in layer], axis=-1)
            else:
                name, features, *rest = layer
                x = ConvNorm(self.common, features // self.divisor, *rest, name=name)(x, live)
        return x


class Auxiliary(nn.Module):
    """A classifier from the middle of the network, for training from scratch."""

    common: layers.Common
    classes: int
    divisor: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> logits [batch, classes], float32."""
        x = nn.avg_pool(x, (5, 5), (3, 3))
        x = ConvNorm(self.common, 128 // self.divisor, 1, name="conv0")(x, live)
        x = ConvNorm(self.common, 768 // self.divisor, 5, name="conv1")(x, live)
        return layers.Head(self.common, self.classes, name="fc")(x.astype(jnp.float32).mean((1, 2)), live)


class WithAuxiliary(Branches):
    """Branches behind which the auxiliary head looks on, if it is asked for its logits (`sow`)."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, sum of the branches' channels]."""
        x = self.joined(x, live)
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            logits = Auxiliary(self.common, self.classes, self.divisor, name="aux")(x, live)
            if not self.is_initializing():
                self.sow("intermediates", "aux_logits", logits)
        return x


class InceptionV3(Chain):
    """Stages stem, block1 (5b), ..., block11 (7c), head; without padding but for what is said.

    `inception_v3_aux` has the auxiliary head's parameters in block8/aux. Its logits come with
    `apply(…, mutable=["intermediates"])` in intermediates/block8/aux_logits, and are not computed otherwise.
    """

    variant: Variant = VARIANTS["inception_v3"]

    @property
    def stages(self) -> tuple[str, ...]:
        """stem, block1, ..., block11, head."""
        return ("stem", *(f"block{i}" for i in range(1, len(BLOCKS) + 1)), "head")

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        v = self.variant
        norms = {"norm": "batch_bias", "momentum": 0.99} if v.keras else {}
        common = layers.Common(self.dtype, self.param_dtype, self.axis_name, epsilon=1e-3, **norms)
        if name == "stem":
            return Branches(common, (tuple(STEM.values()),), v.divisor, name=name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        branches = tuple(BLOCKS.values())[int(name.removeprefix("block")) - 1]
        if v.auxiliary and name == AUXILIARY:
            return WithAuxiliary(common, branches, v.divisor, classes=self.num_classes, name=name)
        return Branches(common, branches, v.divisor, not v.keras, name=name)


def create(name: str, **fields) -> InceptionV3:
    """The network called `name`, with its own dropout where `fields` say nothing."""
    variant = VARIANTS[name]
    return InceptionV3(variant=variant, **{"size": variant.size, "drop_rate": 0.5, **fields})


def conversion(name: str) -> dict[str, naming.Table]:
    """The table for torchvision's and timm's state dicts; without an auxiliary head here, theirs is left out.

    For Keras, which counts layers and has begun with 0 and with 1, two.
    """
    if VARIANTS[name].keras:
        return {"keras": _keras(0), "keras_old": _keras(1)}
    number = {published: i for i, published in enumerate(BLOCKS, 1)}
    stem = {published: layer[0] for published, layer in STEM.items() if layer != "max"}
    conv, mixed = rf"Conv2d_({'|'.join(stem)})\.", rf"Mixed_({'|'.join(BLOCKS)})\.(\w+)\."
    rows = (
        *naming.table(naming.conv_norm(conv + "conv", conv + "bn", "stem/{}"), lambda match: stem[match[1]]),
        *naming.table(
            naming.conv_norm(mixed + "conv", mixed + "bn", "{}"), lambda match: f"block{number[match[1]]}/{match[2]}"
        ),
        *naming.dense("fc", "head"),
    )
    if VARIANTS[name].auxiliary:
        at = r"AuxLogits\.(conv\d)\."
        rows += (
            *naming.table(naming.conv_norm(f"{at}conv", f"{at}bn", f"{AUXILIARY}/aux/{{}}"), lambda match: match[1]),
            *naming.dense(r"AuxLogits\.fc", f"{AUXILIARY}/aux/fc"),
        )
    else:
        rows += ((r"AuxLogits\..*", None, "same"),)
    return {"torchvision": rows, "timm": rows}


def _keras(first: int) -> naming.Table:
    def convs(layers):
        for layer in layers:
            if isinstance(layer[0], tuple):
                yield from convs(layer)
            elif not isinstance(layer, str):
                yield layer[0]

    paths = [f"stem/{name}" for name in convs(STEM.values())]
    paths += [f"block{i}/{name}" for i, block in enumerate(BLOCKS.values(), 1) for b in block for name in convs(b)]
    # conv2d, conv2d_1, …, in the order in which they are written above; a norm has its convolution's number.
    number = {f"_{i}" if i else "": path for i, path in enumerate(paths, first)}
    numbers = "|".join(number)
    rows = [
        *naming.keras_layer(f"conv2d({numbers})", "{}/conv", use_bias=False),
        *naming.keras_batch_norm(f"batch_normalization({numbers})", "{}/bn", scaled=False),
    ]
    return (*naming.table(rows, lambda match: number[match[1]]), *naming.keras_head())
