"""Photographs and labels: sources, splits, the input pipeline, mixing on the device.

`load(config.data)` → `Dataset`; `train_batches` and `eval_batches` turn its splits into batches.
Importing this package imports neither grain nor OpenCV, PIL, pyarrow or TFDS: each waits for its first use.
"""

from tljax.data.dataset import Dataset, Fields, Split, defaults, load
from tljax.data.mix import mix, soft_targets
from tljax.data.pipeline import Augment, eval_batches, feature_batches, permutation, slices, train_batches, view_batches

__all__ = [
    "Augment",
    "Dataset",
    "Fields",
    "Split",
    "defaults",
    "eval_batches",
    "feature_batches",
    "load",
    "mix",
    "permutation",
    "slices",
    "soft_targets",
    "train_batches",
    "view_batches",
]
