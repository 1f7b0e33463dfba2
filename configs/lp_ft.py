"""LP-FT: a linear probe first, so that fine-tuning does not start from a random head (Kumar et al. 2022).

python -m tljax.train --config=configs/lp_ft.py
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, head="8 epochs", last=2, body=0.03, model="efficientnet_lite0")
    config = base(given.model)
    config.name = "lp_ft"
    config.phases = f"lp_ft(head={given.head!r}, then=partial(last={given.last}, body={given.body}))"
    return config
