"""What pre-training is worth as photographs grow: 5, 10, 25, 50 a class and all, by four recipes.

    python -m tljax.sweep --config=configs/sweeps/data_size.py --workdir=runs/data_size
    python -m tljax.sweep --config=configs/sweeps/data_size.py:size=64,seeds=5,steps=600

The head alone (frozen), the last stages (partial), all (full), and all from random weights (scratch), each with a rate
of its own. All take the same number of steps, whatever there is to see: epochs would starve the small sets. A seed
draws other photographs, nested in size: those of 5 a class are among those of 10. The page's picture is accuracy over
the number of training photographs, with a band over seeds.

The frozen and the partial runs are two groups on kept features. The others have nothing to keep, and every size and
seed of theirs is a group of its own: they take most of the time, which grows with size² (pixels) and with steps.
"""

from tljax.config import arguments, base
from tljax.grid import axes


def get_config(arg=""):
    given = arguments(arg, model="efficientnet_lite0", size=96, seeds=3, steps=300, last=2, body=0.03)
    config = base(given.model)
    config.name = "data_size"
    config.image_size = given.size
    config.cache_views = 4
    config.train_for = f"{given.steps} steps"
    config.eval_every = f"{max(1, given.steps // 6)} steps"
    config.optim.warmup = "10 %"
    recipes = (
        ("frozen", "frozen()", ("head",), 1e-2),
        ("partial", f"frozen_norms(partial(last={given.last}, body={given.body}))", ("head",), 1e-2),
        ("full", f"full(body={given.body})", ("head",), 1e-2),
        ("scratch", "full()", ("**",), 2e-3),  # everything starts anew: the same preprocessing as the others
    )
    config.sweep = axes(
        {
            "#recipe, strategy, reset, optim.lr": recipes,
            "data.limit": (5, 10, 25, 50, 0),
            "seed, data.fold_seed": tuple((seed, seed) for seed in range(given.seeds)),
        }
    )
    return config
