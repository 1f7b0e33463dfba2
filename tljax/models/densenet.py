"""DenseNet (Huang et al. 2017), the BC form: bottlenecks, and transitions that halve the channels."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from tljax.errors import UserError
from tljax.models import layers, naming
from tljax.models.chain import Chain


@dataclasses.dataclass(frozen=True)
class Variant:
    """One published network: channels that a dense layer adds, dense layers between the transitions.

    Keras' are other networks than torchvision's: they differ in the epsilon and momentum of the norms.
    """

    growth: int
    depths: tuple[int, ...]
    size: int = 224
    keras: bool = False

    def stages(self) -> tuple[str, ...]:
        """stem, block1, ..., transition1, ..., norm, head: a block is one dense layer."""
        found, count = ["stem"], 0
        for group, depth in enumerate(self.depths):
            found += [f"transition{group}"] if group else []
            found += [f"block{count + i}" for i in range(1, depth + 1)]
            count += depth
        return (*found, "norm", "head")


VARIANTS = {
    "densenet121": Variant(32, (6, 12, 24, 16)),
    "densenet161": Variant(48, (6, 12, 36, 24)),
    "densenet169": Variant(32, (6, 12, 32, 32)),
    "densenet201": Variant(32, (6, 12, 48, 32)),
    "keras_densenet121": Variant(32, (6, 12, 24, 16), keras=True),
    "keras_densenet169": Variant(32, (6, 12, 32, 32), keras=True),
    "keras_densenet201": Variant(32, (6, 12, 48, 32), keras=True),
    # Not published: for tests.
    "densenet_mini": Variant(8, (2, 3, 2), size=32),
}


class Stem(nn.Module):
    """7x7 convolution, normalisation, ReLU, 3x3 max pool: a quarter of the height and width."""

    common: layers.Common
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, 3] -> [batch, height / 4, width / 4, features]."""
        x = layers.Conv(self.common, self.features, 7, 2, padding=3, name="conv")(x)
        x = jax.nn.relu(layers.norm(self.common, "norm")(x, live))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class DenseLayer(nn.Module):
    """Normalised, a 1x1 convolution to 4 times the growth and a 3x3 one to the growth, behind the input itself."""

    common: layers.Common
    growth: int

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, height, width, in + growth]."""
        c, inputs = self.common, x
        x = jax.nn.relu(layers.norm(c, "norm1")(x, live))
        x = layers.Conv(c, 4 * self.growth, padding=0, name="conv1")(x)
        x = jax.nn.relu(layers.norm(c, "norm2")(x, live))
        x = layers.Conv(c, self.growth, 3, padding=1, name="conv2")(x)
        return jnp.concatenate([inputs, x], axis=-1)


class Transition(nn.Module):
    """Normalised, a 1x1 convolution to half the channels and 2x2 averages."""

    common: layers.Common

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, height / 2, width / 2, in / 2]; raises UserError if too small."""
        layers.check_halves(x, self.name)
        features = x.shape[-1] // 2
        x = jax.nn.relu(layers.norm(self.common, "norm")(x, live))
        x = layers.Conv(self.common, features, padding=0, name="conv")(x)
        return nn.avg_pool(x, (2, 2), (2, 2))


class DenseNet(Chain):
    """Stages as in `Variant.stages`; a dense layer concatenates to its input, so each is a function of one array."""

    variant: Variant = VARIANTS["densenet121"]

    @property
    def stages(self) -> tuple[str, ...]:
        """stem, block1, ..., transition1, ..., blockN, norm, head."""
        return self.variant.stages()

    def stage(self, name: str) -> nn.Module:
        """The module of one stage."""
        norms = {"epsilon": 1.001e-5, "momentum": 0.99} if self.variant.keras else {}
        common, growth = layers.Common(self.dtype, self.param_dtype, self.axis_name, **norms), self.variant.growth
        if name == "stem":
            return Stem(common, 2 * growth, name=name)
        if name == "norm":
            return layers.norm(common, name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        return Transition(common, name=name) if name.startswith("transition") else DenseLayer(common, growth, name=name)

    def pool(self, x: jax.Array) -> jax.Array:
        """ReLU, and the mean over the image: [batch, h, w, features] -> [batch, features], float32."""
        return super().pool(jax.nn.relu(x))


def create(name: str, **fields) -> DenseNet:
    """The network called `name`; without `fields` it drops nothing. Raises UserError for stochastic depth."""
    if fields.get("drop_path_rate"):
        raise UserError(f"drop_path_rate={fields['drop_path_rate']}: {name} has no residual branches to drop")
    variant = VARIANTS[name]
    return DenseNet(variant=variant, **{"size": variant.size, **fields})


def conversion(name: str) -> dict[str, naming.Table]:
    """The table for torchvision's state dicts, whose layers are numbered anew in each group; timm's are the same.

    For Keras' networks that of Keras.
    """
    depths = VARIANTS[name].depths
    if VARIANTS[name].keras:
        return {"keras": _keras(depths)}
    # Published files of torchvision still have the older norm.1 for norm1.
    layer, change = r"features\.denseblock(\d+)\.denselayer([1-9]\d*)\.", r"features\.transition(\d+)\."
    rows = [(r"features\.conv0\.weight", "params/stem/conv/kernel", "conv")]
    rows += naming.batch_norm(r"features\.norm0", "stem/norm")
    for i in (1, 2):
        rows += naming.batch_norm(rf"{layer}norm\.??{i}", f"block{{}}/norm{i}")
        rows.append((rf"{layer}conv\.??{i}\.weight", f"params/block{{}}/conv{i}/kernel", "conv"))
    rows += [
        *naming.batch_norm(f"{change}norm", "transition{}/norm"),
        (rf"{change}conv\.weight", "params/transition{}/conv/kernel", "conv"),
        *naming.batch_norm(r"features\.norm5", "norm"),
        *naming.dense("classifier", "head"),
    ]

    def number(match):
        group = int(match[1])
        return sum(depths[: group - 1]) + int(match[2]) if match.re.groups > 1 else group

    table = naming.table(rows, number)
    return {"torchvision": table, "timm": table}


def _keras(depths: tuple[int, ...]) -> naming.Table:
    # conv2_block1_0_bn, …: the stem is conv1, so that groups and transitions count from 2.
    layer = r"conv(\d+)_block(\d+)_"
    rows = [
        *naming.keras_layer("conv1[_/]conv", "stem/conv", use_bias=False),
        *naming.keras_batch_norm("conv1[_/]bn", "stem/norm"),
    ]
    for i in (1, 2):
        rows += naming.keras_batch_norm(f"{layer}{i - 1}_bn", f"block{{}}/norm{i}")
        rows += naming.keras_layer(f"{layer}{i}_conv", f"block{{}}/conv{i}", use_bias=False)
    rows += [
        *naming.keras_layer(r"pool(\d+)_conv", "transition{}/conv", use_bias=False),
        *naming.keras_batch_norm(r"pool(\d+)_bn", "transition{}/norm"),
        *naming.keras_batch_norm("bn", "norm"),
        *naming.keras_head(),
    ]

    def number(match):
        group = int(match[1]) - 1
        return sum(depths[: group - 1]) + int(match[2]) if match.re.groups > 1 else group

    return naming.table(rows, number)
