"""Rows of sweeps that nobody has trained: what `tljax.group` would leave, by a formula and some noise."""

import math

import numpy as np

from tljax import grid
from tljax.config import base, flatten
from tljax.course import TOLD

DEPTHS = ("frozen()", *(f"frozen_norms(partial(last={n}, body=0.03))" for n in (1, 2, 4)))
RATES = tuple(round(1e-3 * 10 ** (i / 3), 6) for i in range(8))


def sweep(axes: dict, **fields):
    """The config of a sweep over some axes."""
    config = base()
    config.name = "made_up"
    config.update_from_flattened_dict(fields)
    config.sweep = grid.axes(axes)
    return config


def rows(config, test: bool = True, diverged=(), classes: int = 14, sigma: float = 0.02) -> list[dict]:
    """A row for each member; those whose number is in `diverged` have no figures."""
    return [row(member, test, member.number in diverged, classes, sigma) for member in grid.members(config)]


def row(member, test, diverged, classes, sigma) -> dict:
    given = flatten(member.config)
    rng = np.random.default_rng([member.number, given["seed"]])
    depth = 0 if given["strategy"] == "frozen()" else len(given["strategy"]) % 5 + 1
    peak = math.log10(0.03) - 0.15 * depth
    limit = given["data.limit"]
    n = min(classes * limit, 640) if limit else 675
    accuracy = (
        0.85 + 0.01 * depth - 0.09 * (math.log10(max(given["optim.lr"], 1e-6)) - peak) ** 2 - 0.6 / math.sqrt(n / 10)
    )
    accuracy = float(np.clip(accuracy + sigma * rng.normal(), 0.05, 0.99))
    nll = float(3.2 * (1 - accuracy) ** 1.2 + 0.1)
    figures = {"accuracy": accuracy, "macro_f1": accuracy - 0.02, "nll": nll, "ece": 0.05}
    on_test = {name: value * (0.97 if name != "nll" else 1.06) for name, value in figures.items()}
    curve = [
        {"step": 42 * e, "epoch": float(e), "val/nll": nll + 2 * math.exp(-e / 3) + 0.01 * rng.normal(),
         "val/accuracy": accuracy * (1 - math.exp(-e / 2))}
        for e in range(1, 16)
    ]  # fmt: skip
    return {
        "number": member.number, "fields": member.fields, "config": {name: given[name] for name in TOLD},
        "n_train": n, "n_val": 57, "n_test": 661, "status": "diverged at step 17" if diverged else "finished",
        "steps": 16 if diverged else 630, "epochs": 0.4 if diverged else 15.0,
        "best": None if diverged else {"step": 588, "epoch": 14.0, "value": nll},
        "val": None if diverged else figures, "test": on_test if test and not diverged else None,
        "curve": curve[:0] if diverged else curve, "seconds": 1.25, "group": depth, "how": "map" if depth else "vmap",
        "kept": "memory",
    }  # fmt: skip
