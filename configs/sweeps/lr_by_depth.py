"""How deep to train, each depth at its own best learning rate: 4 depths × 8 rates × 3 seeds.

    python -m tljax.sweep --config=configs/sweeps/lr_by_depth.py --workdir=runs/lr_by_depth
    python -m tljax.sweep --config=configs/sweeps/lr_by_depth.py:model=resnet50 --config.sweep.seed="(0,)"
    python -m tljax.sweep --config=configs/sweeps/lr_by_depth.py --config.halving="halving(rungs=3, keep=0.5)"

Each depth is a group: its frozen prefix is computed once, and one compiled step trains its 24 members. All are trained
to the end: halving takes a third of the steps, but on the fruit photographs it keeps the wrong rates (docs/sweeps.md).
"""

from tljax.config import arguments, base
from tljax.grid import axes


def get_config(arg=""):
    given = arguments(arg, model="efficientnet_lite0", body=0.03)
    config = base(given.model)
    config.name = "lr_by_depth"
    config.cache_views = 4
    depths = (f"frozen_norms(partial(last={last}, body={given.body}))" for last in (1, 2, 4))
    config.sweep = axes(
        {
            "strategy": ("frozen()", *depths),
            "optim.lr": tuple(round(1e-3 * 10 ** (i / 3), 6) for i in range(8)),  # 0.001 to 0.215
            "seed": range(3),
        }
    )
    config.halving = ""
    return config
