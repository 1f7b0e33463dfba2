"""How far figures lie apart by chance: a linear probe from ten seeds, in one compiled step.

python -m tljax.sweep --config=configs/sweeps/seeds.py --workdir=runs/seeds
python -m tljax.sweep --config=configs/sweeps/seeds.py:count=30,last=2
"""

from tljax.config import arguments, base
from tljax.grid import axes


def get_config(arg=""):
    given = arguments(arg, model="efficientnet_lite0", count=10, last=0)
    config = base(given.model)
    config.name = f"seeds{given.count}"
    config.cache_views = 4
    config.strategy = f"frozen_norms(partial(last={given.last}, body=0.03))" if given.last else "frozen()"
    config.sweep = axes({"seed": range(given.count)})
    return config
