"""How transferable the features of each depth are: the first n stages from ImageNet, for several n.

    python -m tljax.sweep --config=configs/sweeps/transferability.py --workdir=runs/transferability
    python -m tljax.sweep --config=configs/sweeps/transferability.py:every=3,seeds=5

After Yosinski et al. 2014, "How transferable are features in deep neural networks?". A is the task of the weights
(ImageNet), B that of the data. Stages are counted from the input, without the head, which is new in all. At each n:

    frozen n, rest anew      the paper's AnB: the first n stages loaded and frozen, all behind them start anew. It falls
                             with n where features are specific to A; in the middle, where frozen features have lost
                             those with which they had learned to work together
    tuned n, rest anew       the paper's AnB+: the same, but the first n train as well
    random n, rest anew      the control: the first n stages are random and frozen. Their norms use the batch, as random
                             weights have no statistics to store
    frozen n, rest loaded    what one does in practice: freeze the first n, fine-tune what is behind them. Beside AnB it
                             tells how much of the transfer lies in the later stages
    scratch                  n = 0, the paper's base B: everything starts anew

The paper has the networks BnB as well, copies of base B itself: train configs/scratch.py, and give the folder of that
run as --config.weights. All train for as many steps, at one rate; loaded stages that train do so at `body` times it,
where the paper has 1. The later the frozen stages end, the cheaper: most of the time goes to small n and to `tuned`.
"""

from tljax import models
from tljax.config import arguments, base
from tljax.errors import UserError
from tljax.grid import axes


def get_config(arg=""):
    given = arguments(arg, model="efficientnet_lite0", size=96, seeds=3, steps=300, every=6, body=0.1, lr=2e-3)
    if given.every < 1:
        raise UserError(f"argument every={given.every}: expected a number of stages, at least 1")
    config = base(given.model)
    config.name = "transferability"
    config.image_size = given.size
    config.cache_views = 4
    config.train_for = f"{given.steps} steps"
    config.eval_every = f"{max(1, given.steps // 6)} steps"
    config.optim.lr = given.lr
    config.optim.warmup = "10 %"
    stages = models.create(given.model, 1).stages
    whole = len(stages) - 1  # the head is no stage to be transferred
    new = stages[-1:]
    points = [("scratch", 0, "full()", ("**",), "plan")]
    for n in [*range(given.every, whole, given.every), whole]:
        frozen = f"partial(last={whole - n})"
        tuned = dict.fromkeys(stages[:n], given.body) | {"**": 1.0}
        points += [
            ("frozen n, rest anew", n, frozen, stages[n:], "plan"),
            ("tuned n, rest anew", n, f"discriminative({tuned})", stages[n:], "plan"),
            ("random n, rest anew", n, frozen, ("**",), "batch"),
            ("frozen n, rest loaded", n, f"partial(last={whole - n}, body={given.body})", new, "plan"),
        ]
    several = "#kind, #first n stages, strategy, reset, norm_stats"
    config.sweep = axes({several: points, "seed": range(given.seeds)})
    return config
