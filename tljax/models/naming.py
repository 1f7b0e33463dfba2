"""Words for conversion tables: rows `(pattern of a source key, target path, name of the transform)`.

A target is a path, a function from the match to a path, or None for a key that is knowingly left out. The
transforms are those of tljax.weights.matcher: "conv" (OIHW to HWIO), "linear" (OI to IO), "same".
"""

import re
from collections.abc import Callable, Sequence

Target = str | Callable[[re.Match], str] | None
Row = tuple[str, Target, str]
Table = tuple[Row, ...]


def table(rows: Sequence[Row], number: Callable[[re.Match], int]) -> Table:
    """The rows with every `{}` in a target filled by the number of the block that the match is about."""

    def filled(target: Target) -> Target:
        if target is None or "{}" not in target:
            return target
        return lambda match: target.format(number(match))

    return tuple((pattern, filled(target), transform) for pattern, target, transform in rows)


def batch_norm(source: str, target: str) -> list[Row]:
    """The five rows of a PyTorch BatchNorm; its count of batches serves nothing here."""
    return [
        (rf"{source}\.weight", f"params/{target}/scale", "same"),
        (rf"{source}\.bias", f"params/{target}/bias", "same"),
        (rf"{source}\.running_mean", f"batch_stats/{target}/mean", "same"),
        (rf"{source}\.running_var", f"batch_stats/{target}/var", "same"),
        (rf"{source}\.num_batches_tracked", None, "same"),
    ]
