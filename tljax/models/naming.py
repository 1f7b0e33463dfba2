"""Words for conversion tables: rows `(pattern of a source key, target path, name of the transform)`.

A target is a path, a function from the match to a path, None for a key that is knowingly left out, or a tuple of
targets, between which the array is divided evenly along its first axis. The transforms are those of
tljax.weights.transforms: "conv" (OIHW to HWIO), "linear" (OI to IO), "flat:n" (a convolution over the whole image of
n pixels, OIHW, to a linear map of its flattened values), "same", "squeezed" (without leading axes of one), … Beside a
None it may name a constant of tljax.weights.inverse, which files in that naming hold. Keras' arrays are HWIO and IO
already, and have "bgr", "depthwise" and "rows_first".

A table is also read backwards, to write files: of the names that a pattern matches the regular expression's first
choice is written, `(?:a|b)?` as a, `(?:a)??` as nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence

Target = str | Callable[[re.Match], str] | None
Row = tuple[str, Target | tuple[Target, ...], str]
Table = tuple[Row, ...]


def table(rows: Sequence[Row], number: Callable[[re.Match], int | str]) -> Table:
    """The rows with every `{}` in a target filled by the number, or name, of what the match is about."""

    def filled(target):
        if isinstance(target, tuple):
            return tuple(map(filled, target))
        if target is None or "{}" not in target:
            return target
        return lambda match: target.format(number(match))

    return tuple((pattern, filled(target), transform) for pattern, target, transform in rows)


def number_of(depths: Sequence[int], level: int, match: re.Match) -> int:
    """The number through all levels of the block that the match's second group counts, from 0, within a level.

    Without a second group it is that of the level's first block. depths: the number of blocks of each level.
    """
    return sum(depths[:level]) + (int(match[2]) if match.re.groups > 1 else 0) + 1


def batch_norm(source: str, target: str) -> list[Row]:
    """The five rows of a PyTorch BatchNorm; its count of batches serves nothing here."""
    return [
        (rf"{source}\.weight", f"params/{target}/scale", "same"),
        (rf"{source}\.bias", f"params/{target}/bias", "same"),
        (rf"{source}\.running_mean", f"batch_stats/{target}/mean", "same"),
        (rf"{source}\.running_var", f"batch_stats/{target}/var", "same"),
        (rf"{source}\.num_batches_tracked", None, "count"),
    ]


def conv_norm(conv_source: str, norm_source: str, target: str, conv_name="conv", norm_name="bn") -> list[Row]:
    """The rows of a convolution without a bias and of the BatchNorm behind it, both of ours within `target`."""
    return [
        *conv(conv_source, f"{target}/{conv_name}", use_bias=False),
        *batch_norm(norm_source, f"{target}/{norm_name}"),
    ]


def affine(source: str, target: str) -> list[Row]:
    """The two rows of a PyTorch norm without statistics."""
    return [
        (rf"{source}\.weight", f"params/{target}/scale", "same"),
        (rf"{source}\.bias", f"params/{target}/bias", "same"),
    ]


def conv(source: str, target: str, use_bias: bool = True) -> list[Row]:
    """The rows of a PyTorch convolution."""
    rows: list[Row] = [(rf"{source}\.weight", f"params/{target}/kernel", "conv")]
    return rows + [(rf"{source}\.bias", f"params/{target}/bias", "same")] * use_bias


def dense(
    source: str, *targets: str, weight: str = r"\.weight", bias: str = r"\.bias", transform: str = "linear"
) -> list[Row]:
    """The two rows of a PyTorch linear layer, which may hold several of ours: query, key and value in one."""
    part = lambda name: tuple(f"params/{target}/{name}" for target in targets)
    one_or_all = lambda paths: paths if len(paths) > 1 else paths[0]
    return [
        (source + weight, one_or_all(part("kernel")), transform),
        (source + bias, one_or_all(part("bias")), "same"),
    ]


def keras(layer: str, variables: Mapping[str, tuple[Target, str]]) -> list[Row]:
    """The rows of a Keras layer's variables, in its order: name → (target, transform).

    A variable is `layer/name` in TensorFlow.js, `layer/layer/name:0` in the `.h5` of Keras 2, the same without its
    `:0` in that of Keras 3, and `layers/layer/0`, `…/1` as `weights.hdf5` reads its `.weights.h5`.
    """
    return [
        (rf"(?:.+/)?{layer}/(?:{name}(?::0)?|{i})", target, transform)
        for i, (name, (target, transform)) in enumerate(variables.items())
    ]


def keras_layer(layer: str, target: str, use_bias: bool = True, transform: str = "same") -> list[Row]:
    """The rows of a Keras convolution or dense layer."""
    # In Keras 2 a depthwise convolution's kernel has a name of its own.
    kernel = "(?:depthwise_)?kernel" if transform == "depthwise" else "kernel"
    bias = {"bias": (f"params/{target}/bias", "same")} if use_bias else {}
    return keras(layer, {kernel: (f"params/{target}/kernel", transform), **bias})


def keras_norm(layer: str, target: str) -> list[Row]:
    """The rows of a Keras LayerNormalization."""
    return keras(layer, {"gamma": (f"params/{target}/scale", "same"), "beta": (f"params/{target}/bias", "same")})


def keras_batch_norm(layer: str, target: str, scaled: bool = True) -> list[Row]:
    """The rows of a Keras BatchNormalization, which may have no scale."""
    scale = {"gamma": (f"params/{target}/scale", "same")} if scaled else {}
    mean, var = (f"batch_stats/{target}/{which}" for which in ("mean", "var"))
    rest = {"beta": (f"params/{target}/bias", "same"), "moving_mean": (mean, "same"), "moving_variance": (var, "same")}
    return keras(layer, scale | rest)


def keras_head(transform: str = "same") -> list[Row]:
    """The rows of the last layer, whatever Keras has called it over the years."""
    return keras_layer("(?:predictions|probs|fc1000|[Ll]ogits)", "head", transform=transform)


def keras_preprocessing() -> list[Row]:
    """The rows of the Normalization within some networks: of images, which the card's mean and std prepare here."""
    return keras(r"normalization(?:_\d+)?", dict.fromkeys(("mean", "variance", "count"), (None, "same")))
