"""Which strategy is the better one, told by cross-validation: every photograph of train and val is in val once.

    python -m tljax.sweep --config=configs/sweeps/cross_validation.py --workdir=runs/cross_validation
    python -m tljax.sweep --config=configs/sweeps/cross_validation.py:folds=10,repeats=3

Folds of more than seven hundred photographs say more than a val split of 57. The folds of one division share most of
their training photographs, so their figures are not independent: the page's paired test corrects for it (Nadeau and
Bengio 2003). `repeats` divides the photographs anew so many times. Test chooses nothing, as everywhere.

Each strategy is a group: its folds, repeats and rates train in one compiled step, on one set of kept features.
"""

from tljax.config import arguments, base
from tljax.grid import axes


def get_config(arg=""):
    given = arguments(arg, model="efficientnet_lite0", folds=5, repeats=2, body=0.03)
    config = base(given.model)
    config.name = "cross_validation"
    config.cache_views = 4
    depths = (f"frozen_norms(partial(last={last}, body={given.body}))" for last in (1, 2))
    config.sweep = axes(
        {
            "strategy": ("frozen()", *depths),
            "optim.lr": (5e-3, 1e-2, 2e-2),
            "data.val": tuple(f"fold:{i}/{given.folds}" for i in range(1, given.folds + 1)),
            "data.fold_seed": range(given.repeats),
        }
    )
    return config
