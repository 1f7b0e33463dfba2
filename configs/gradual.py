"""Gradual unfreezing: the head first, then one more stage each epoch, from the last to the first (ULMFiT).

python -m tljax.train --config=configs/gradual.py
python -m tljax.plan --config=configs/gradual.py      # what trains in which phase
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, every="0.5 epochs", model="efficientnet_lite0")
    config = base(given.model)
    config.name = "gradual"
    config.phases = f"gradual_unfreezing(every={given.every!r})"
    config.optim.lr = 1e-3
    return config
