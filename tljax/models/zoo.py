"""The models by name: create one, know its shapes without computing, initialise only the leaves needed."""

import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import traverse_util

from tljax import errors
from tljax.models import (
    clip,
    convnext,
    densenet,
    efficientnet,
    inception,
    mobilenet,
    naming,
    resnet,
    resnetv2,
    swin,
    vgg,
    vit,
)
from tljax.models.chain import Chain

_FAMILIES = (clip, convnext, densenet, efficientnet, inception, mobilenet, resnet, resnetv2, swin, vgg, vit)
_COLLECTIONS = ("params", "batch_stats")


def names() -> tuple[str, ...]:
    """The names of all models."""
    return tuple(name for family in _FAMILIES for name in family.VARIANTS)


def _family(name: str):
    for family in _FAMILIES:
        if name in family.VARIANTS:
            return family
    raise errors.unknown("model", name, names())


def create(
    name: str, num_classes: int, *, dtype=jnp.float32, param_dtype=jnp.float32, axis_name=None, **overrides
) -> Chain:
    """The model called `name`; `dtype` is that of the computation, `axis_name` the axis of a pmap.

    Overrides: drop_rate, drop_path_rate, channels (of the images, by default 3). An unknown name raises UserError.
    """
    known = ("channels", "drop_path_rate", "drop_rate")
    unknown = set(overrides) - set(known)
    if unknown:
        raise errors.unknown("model field", min(unknown), known)
    return _family(name).create(
        name, num_classes=num_classes, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name, **overrides
    )


def input_size(name: str) -> int:
    """Height and width in pixels of the images with which the published network was trained."""
    return _family(name).VARIANTS[name].size


def conversion(name: str) -> dict[str, naming.Table]:
    """The conversion tables of a model, by the naming of the source."""
    return _family(name).conversion(name)


def positions(name: str) -> dict[str, int]:
    """{path of position embeddings: how many of them, the first, are of no patch}; {} for most models."""
    family = _family(name)
    return family.positions(name) if hasattr(family, "positions") else {}


def patches(name: str) -> tuple[str, ...]:
    """The paths of kernels that embed patches, which can be resized; () for most models."""
    family = _family(name)
    return getattr(family, "PATCHES", ())


@functools.cache
def stem(name: str) -> str:
    """The leaf "params/…/kernel" of the convolution that sees the image: the one that has its channels."""
    three, four = (traverse_util.flatten_dict(shapes(create(name, 2, channels=n)), sep="/") for n in (3, 4))
    (leaf,) = (path for path in three if three[path].shape != four[path].shape)
    return leaf


def _init(model: Chain, key: jax.Array, size: int | tuple[int, int] | None) -> dict:
    size = size or model.size
    height, width = size if isinstance(size, tuple) else (size, size)
    variables = model.init(key, jnp.zeros((1, height, width, model.channels)))
    return {collection: variables.get(collection, {}) for collection in _COLLECTIONS}


def _ordered(model: Chain, tree: dict) -> dict:
    """The tree with its stages from input to output: jax sorts them by name, block10 before block2."""
    trees = {collection: tree.get(collection, {}) for collection in _COLLECTIONS}
    return {
        collection: {stage: tree[stage] for stage in model.stages if stage in tree}
        for collection, tree in trees.items()
    }


def shapes(model: Chain, size: int | tuple[int, int] | None = None) -> dict:
    """{"params": ..., "batch_stats": ...} as nested dicts of ShapeDtypeStruct; nothing is computed.

    `size` is the input's height and width in pixels, one number if equal, by default the model's own.
    """
    model = model.clone(axis_name=None)  # the axis exists within pmap only, and shapes do not depend on it
    return _ordered(model, jax.eval_shape(lambda key: _init(model, key, size), jax.random.key(0)))


def initialise(model: Chain, key: jax.Array, size: int | None = None, only: Collection[str] | None = None) -> dict:
    """{"params": ..., "batch_stats": ...} with random parameters; a leaf depends on key and path alone.

    `only` names the leaves wanted ("params/head/kernel"): the others are left out of the result and not
    computed. A path that the model lacks raises UserError.
    """
    known = traverse_util.flatten_dict(shapes(model, size), sep="/")
    wanted = known.keys() if only is None else set(only)
    for path in sorted(wanted - known.keys()):
        raise errors.unknown("leaf", path, known)
    model = model.clone(axis_name=None)

    # Under jit everything that does not lead to a wanted leaf is dead code, the forward pass included.
    @jax.jit
    def init(key):
        leaves = traverse_util.flatten_dict(_init(model, key, size), sep="/")
        return {path: leaves[path] for path in known if path in wanted}

    return _ordered(model, traverse_util.unflatten_dict(init(key), sep="/"))
