"""A linear probe: the pre-trained network is a fixed feature extractor, a new head learns.

python -m tljax.train --config=configs/frozen.py

Its features are computed once, of four augmented views of each photograph (docs/cache.md).
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, model="efficientnet_lite0")
    config = base(given.model)
    config.name = "frozen"
    config.strategy = "frozen()"
    config.cache_views = 4
    config.checkpoint_every = "5 epochs"  # which take seconds on kept features
    config.train_for = "20 epochs"
    config.optim.warmup = "2 epochs"
    return config
