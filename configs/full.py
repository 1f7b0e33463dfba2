"""Full fine-tuning: everything learns, the pre-trained stages at a fraction of the head's rate; norms move.

python -m tljax.train --config=configs/full.py
python -m tljax.train --config=configs/full.py:body=0.1
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, body=0.03, model="efficientnet_lite0")
    config = base(given.model)
    config.name = "full"
    config.strategy = f"full(body={given.body})"
    return config
