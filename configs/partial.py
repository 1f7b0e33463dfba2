"""Partial fine-tuning: the last stages and a new head learn, the rest stays as ImageNet left it.

python -m tljax.train --config=configs/partial.py
python -m tljax.train --config=configs/partial.py:last=6
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, last=4, model="efficientnet_lite0")
    config = base()
    config.name = f"partial{given.last}"
    config.model = config.weights = given.model
    config.strategy = f"partial(last={given.last})"
    return config
