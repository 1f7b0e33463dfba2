"""Partial fine-tuning: the last stages learn slowly, a new head fast, the rest stays as ImageNet left it.

    python -m tljax.train --config=configs/partial.py
    python -m tljax.train --config=configs/partial.py:last=6
    python -m tljax.train --config=configs/partial.py:last=2,norms=true

    python -m tljax.train --config=configs/partial.py:model=keras_resnet50_old

The norms (`bn1`, `downsample_bn`, `norm2`, …) are frozen, so that they go on using the statistics of the million images
that they were trained on: batches of 16 tell too little. `norms=true` trains them, and then their statistics, if they
have any, move as well. A network that has no norms (`vgg16`) takes `norms=true`, too.

What the frozen stages make of four augmented views of each photograph is computed once (docs/cache.md).
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, last=2, body=0.03, norms=False, model="efficientnet_lite0")
    config = base(given.model)
    config.name = f"partial{given.last}"
    config.cache_views = 4
    config.checkpoint_every = "5 epochs"  # which take seconds on kept features
    config.strategy = f"partial(last={given.last}, body={given.body})"
    if not given.norms:
        config.strategy = f"frozen_norms({config.strategy})"
    return config
