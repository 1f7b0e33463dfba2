"""BitFit: every bias and the head (Ben Zaken et al. 2022). A BatchNorm whose bias trains is live: its statistics move.

python -m tljax.train --config=configs/bitfit.py
python -m tljax.plan --config=configs/bitfit.py --cost      # cheap to store, not to compute: see what it says
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, body=0.1, model="efficientnet_lite0")
    config = base(given.model)
    config.name = "bitfit"
    config.strategy = f"biases_only(body={given.body})"
    return config
