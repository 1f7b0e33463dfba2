"""Gradual unfreezing: the head first, then one more stage each phase, from the last to the first (ULMFiT).

    python -m tljax.train --config=configs/gradual.py
    python -m tljax.plan --config=configs/gradual.py      # what trains in which phase

As in Howard & Ruder (2018) each phase has a slanted triangle of its own: the rate rises for a tenth of it and falls
for the rest, so that what is thawed, and what goes on training, starts slowly.
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, every="0.5 epochs", model="efficientnet_lite0")
    config = base(given.model)
    config.name = "gradual"
    config.phases = f"gradual_unfreezing(every={given.every!r})"
    config.optim.lr = 1e-3
    config.optim.schedule = "slanted_triangular"
    config.optim.warmup = "10 %"
    config.optim.restart = True
    return config
