"""Surgical fine-tuning: one stage, wherever it lies, and the head (Lee et al. 2023).

python -m tljax.train --config=configs/surgical.py
python -m tljax.train --config=configs/surgical.py:stage=stem
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, stage="block1", model="efficientnet_lite0")
    config = base(given.model)
    config.name = f"surgical-{given.stage}"
    config.strategy = f"surgical({given.stage!r})"
    return config
