"""Layer-wise decay: the learning rate falls by a constant factor from each stage to the one before it.

python -m tljax.train --config=configs/layerwise.py
python -m tljax.train --config=configs/layerwise.py:rate=0.5
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, rate=0.7, model="efficientnet_lite0")
    config = base(given.model)
    config.name = f"layerwise{given.rate}"
    config.strategy = f"layerwise_decay({given.rate})"
    config.optim.lr = 3e-3
    return config
