"""Chain-thaw: the head, then every stage alone from the first to the last, then all together (Felbo et al. 2017).

python -m tljax.train --config=configs/chain_thaw.py
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, each="0.5 epochs", model="efficientnet_lite0")
    config = base(given.model)
    config.name = "chain_thaw"
    config.phases = f"chain_thaw(each={given.each!r})"
    config.optim.lr = 1e-3
    return config
