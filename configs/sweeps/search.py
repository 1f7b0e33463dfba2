"""Rate, decay, smoothing and depth searched at once: 48 settings, of which a few are trained to the end.

    python -m tljax.sweep --config=configs/sweeps/search.py --workdir=runs/search
    python -m tljax.sweep --config=configs/sweeps/search.py --config.search="random(48)" --config.halving=""

Optuna (pip install -e '.[sweep]') suggests each generation from the figures of those before; of each generation and
depth the worse half stops after an eighth, a quarter and a half of the steps.
"""

from tljax.config import arguments, base
from tljax.distributions import loguniform, uniform
from tljax.grid import axes


def get_config(arg=""):
    given = arguments(arg, model="efficientnet_lite0", body=0.03, count=48)
    config = base(given.model)
    config.name = "search"
    config.cache_views = 4
    config.sweep = axes(
        {
            "strategy": ("frozen()", f"frozen_norms(partial(last=2, body={given.body}))"),
            "optim.lr": loguniform(1e-3, 3e-1),
            "optim.weight_decay": loguniform(1e-3, 1.0),
            "label_smoothing": uniform(0, 0.2),
        }
    )
    config.search = f"optuna({given.count}, generation=16)"
    config.halving = "halving(rungs=3, keep=0.5)"
    return config
