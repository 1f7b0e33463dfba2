"""The inverted residual block (Sandler et al. 2018) and its kin, of which MobileNet and EfficientNet are made."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from flax import linen as nn

from tljax.models import layers, naming


class Block(NamedTuple):
    """One block: kernel size, stride, channels between its convolutions and behind them.

    `squeezed` are the channels within squeeze-excite, 0 for none. A fused block (Tan & Le 2021) has one full
    convolution for the expansion and the depthwise one, and for everything where it does not expand.
    """

    kernel: int
    stride: int
    wide: int
    out: int
    expands: bool = True
    squeezed: int = 0
    fused: bool = False
    act: str = "relu6"
    se_act: str = "relu"
    se_gate: str = "sigmoid"


def rounded(channels: float) -> int:
    """The nearest multiple of 8 that does not lose more than a tenth."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def padding(size: int, same: bool) -> layers.Padding:
    """TensorFlow's SAME, or symmetric as in PyTorch."""
    return "SAME" if same else size // 2


class ConvNormAct(nn.Module):
    """The stem and the top: convolution, normalisation, activation."""

    common: layers.Common
    act: str
    features: int
    size: int = 1
    stride: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, features]."""
        x = layers.Conv(
            self.common, self.features, self.size, self.stride, padding(self.size, self.same), name="conv"
        )(x)  # fmt: skip
        return getattr(jax.nn, self.act)(layers.norm(self.common, "bn")(x, live))


class MBConv(nn.Module):
    """Inverted residual block, with squeeze-excite (Hu et al. 2018) where the block says so."""

    common: layers.Common
    block: Block
    same: bool
    drop_path_rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, live: frozenset[str]) -> jax.Array:
        """x: [batch, height, width, in] -> [batch, h, w, block.out]."""
        common, block, inputs, channels = self.common, self.block, x, x.shape[-1]
        act, across = getattr(jax.nn, block.act), padding(block.kernel, self.same)
        full = {"size": block.kernel, "stride": block.stride, "padding": across}
        if block.expands:
            x = layers.Conv(common, block.wide, **full if block.fused else {}, name="expand_conv")(x)
            x = act(layers.norm(common, "bn0")(x, live))
        if not block.fused:
            x = layers.Conv(common, block.wide, **full, groups=block.wide, name="depthwise_conv")(x)
            x = act(layers.norm(common, "bn1")(x, live))
        if block.squeezed:
            gate = x.mean((1, 2), keepdims=True)
            gate = layers.Conv(common, block.squeezed, use_bias=True, name="se_reduce")(gate)
            gate = layers.Conv(common, block.wide, use_bias=True, name="se_expand")(getattr(jax.nn, block.se_act)(gate))
            x = x * getattr(jax.nn, block.se_gate)(gate)
        alone = block.fused and not block.expands
        x = layers.Conv(common, block.out, **full if alone else {}, name="project_conv")(x)
        x = layers.norm(common, "bn2")(x, live)
        if alone:
            x = act(x)
        if block.stride == 1 and channels == block.out:
            if self.drop_path_rate and "/".join(self.path) in live:
                x = layers.drop(self, x, self.drop_path_rate, common.axis_name, whole=True)
            x = x + inputs
        return x


def places(blocks: Sequence[Block]) -> list[tuple[int, int]]:
    """(number of the group, number within it) of each block, from 0: the blocks of a group have one width."""
    return [(g, i) for g, (_, run) in enumerate(itertools.groupby(b.out for b in blocks)) for i, _ in enumerate(run)]


def part_rows(
    prefix: str,
    stages: Mapping[str | None, tuple[str, Mapping[str, str]]],
    conv: Callable[[str, str, bool], list[naming.Row]] = naming.conv,
    norm: Callable[[str, str], list[naming.Row]] = naming.batch_norm,
) -> list[naming.Row]:
    """The rows for names `prefix`, part: each in one row for all stages, whatever the part is called with us.

    stages: what the group in `prefix` matches → (our stage, {part as the source calls it: as we do}). A part is a
    norm if ours is called bn…, else a convolution. What is nowhere leads to a path that no model has. conv, norm: what
    writes their rows, from name, path and whether there is a bias.
    """

    def target(part):
        def module(match):
            stage, parts = stages.get(match[1], (match[1], {}))
            return f"{stage}/{parts.get(part, part)}"

        return module

    rows = []
    for part, ours in dict(item for _, parts in stages.values() for item in parts.items()).items():
        at = prefix + re.escape(part)
        found = norm(at, "{}") if ours.startswith("bn") else conv(at, "{}", ours.startswith("se_"))
        rows += naming.table(found, target(part))
    return rows


def keras_rows(prefix: str, stages: Mapping[str | None, tuple[str, Mapping[str, str]]]) -> list[naming.Row]:
    """As `part_rows`, of Keras' layers."""

    def conv(source, target, use_bias):
        transform = "depthwise" if re.search("depthwise|dwconv", source) else "same"
        return naming.keras_layer(source, target, use_bias, transform)

    return part_rows(prefix, stages, conv, naming.keras_batch_norm)


# What timm calls the convolutions of a block, by whether it is fused and whether it expands.
_TIMM = {
    (False, True): ("conv_pw", "conv_dw", "conv_pwl"),
    (False, False): ("conv_dw", "conv_pw"),
    (True, True): ("conv_exp", "conv_pwl"),
    (True, False): ("conv",),
}


def timm_parts(block: Block) -> dict[str, str]:
    """{part of a block in timm's names: in ours}."""
    parts = {}
    for n, (conv, (ours, bn)) in enumerate(zip(_TIMM[block.fused, block.expands], _parts(block)), 1):
        parts |= {conv: ours, f"bn{n}": bn}
    return parts | ({"se.conv_reduce": "se_reduce", "se.conv_expand": "se_expand"} if block.squeezed else {})


def torchvision_parts(block: Block) -> dict[str, str]:
    """{part of a block in torchvision's names, where they are counted through: in ours}."""
    parts, ours = {}, _parts(block)
    for n, (conv, bn) in enumerate(ours):
        if block.squeezed and n == len(ours) - 1:
            parts |= {f"{n}.fc1": "se_reduce", f"{n}.fc2": "se_expand"}
            n += 1
        parts |= {f"{n}.0": conv, f"{n}.1": bn}
    return parts


def timm_places(blocks: Sequence[Block]) -> dict[str, tuple[str, dict[str, str]]]:
    """Of all blocks, for `part_rows`: timm counts anew where the blocks' width changes."""
    return {f"{group}.{i}": (f"block{n}", timm_parts(blocks[n - 1])) for n, (group, i) in enumerate(places(blocks), 1)}


def _parts(block: Block) -> list[tuple[str, str]]:
    """(convolution, its norm) in order."""
    expand, depthwise, project = ("expand_conv", "bn0"), ("depthwise_conv", "bn1"), ("project_conv", "bn2")
    return [expand] * block.expands + [depthwise] * (not block.fused) + [project]
