"""No transfer: the same network from random weights, for as many steps as `partial`. What pre-training is worth.

python -m tljax.train --config=configs/scratch.py
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, model="efficientnet_lite0")
    config = base(given.model)
    config.name = "scratch"
    config.weights = ""
    config.strategy = "full()"
    config.optim.lr = 2e-3
    return config
