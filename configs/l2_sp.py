"""L2-SP: what trains is held to the weights that were loaded (Li et al. 2018), and what is forgotten is measured.

    python -m tljax.train --config=configs/l2_sp.py
    python -m tljax.train --config=configs/l2_sp.py:strength=0      # the same without, for comparison
    python -m tljax.wise_ft --workdir=runs/…                        # the weights between loaded and trained

The last stages learn at a tenth of the head's rate, enough to forget. The penalty takes the place of weight decay.
The run ends with the loaded head on twenty ImageNet photographs, before and after (extra `source`).
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, strength=0.1, last=2, body=0.1, model="efficientnet_lite0")
    config = base(given.model)
    config.name = f"l2_sp{given.strength:g}"
    config.strategy = f"first(rules(('**/bn*', 0)), partial(last={given.last}, body={given.body}))"
    config.regulariser = f"l2_sp(strength={given.strength})" if given.strength else ""
    config.optim.weight_decay = 0.0
    config.source.data = "imagenet_photos"
    return config
