"""What the steps of a phase are fed with: augmented photographs, or their kept features."""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from tljax import cache, data
from tljax.data import Split
from tljax.phases import Phase

if TYPE_CHECKING:
    from tljax.experiment import Experiment


def batches(
    exp: "Experiment", phase: Phase, train: Split, kept: cache.FeatureCache | None, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the batches of a phase's steps behind step `start`.

    They are {"image": uint8 [b, size, size, 3], "label": int32 [b]}, or with a cache {"features": [b, …], "label"}.
    """
    config, p = exp.config, exp.preprocessing
    common = {
        "batch_size": config.batch_size, "seed": config.seed, "start_step": start, "stop_step": phase.stop,
        "process": (jax.process_index(), jax.process_count()),
    }  # fmt: skip
    if not kept:
        return data.train_batches(
            train, size=p.size, augment=config.augment, interpolation=p.interpolation, crop=p.crop,
            views=config.cache_views, threads=config.data.threads, **common,
        )  # fmt: skip
    if jax.process_count() > 1 and start < phase.stop:  # which compute together, and ask for rows of their own
        for view in cache.needed(config, phase, len(train), start):
            kept(train, view)
    count, first = cache.views(config), phase.start * config.batch_size // len(train)

    @functools.cache
    def features(view):  # in the order of the phase's first epoch that shows the view
        order = data.permutation(len(train), config.seed, first + (view - first) % count)
        return kept.growing(train, view, order)

    return data.feature_batches(features, train.labels, views=count, **common)
