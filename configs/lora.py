"""LoRA: the network stays frozen, low-rank updates beside its layers and a new head train (Hu et al. 2022).

    python -m tljax.train --config=configs/lora.py
    python -m tljax.train --config=configs/lora.py:rank=16,targets=block1*/**
    python -m tljax.adapters --workdir=RUN --save=fruit.safetensors --merge=plain.safetensors

The adapters are a small file that goes onto the same base again, or they are merged into plain weights.
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, rank=8, alpha=16.0, dropout=0.0, targets="**", model="efficientnet_lite0")
    config = base(given.model)
    config.name = f"lora{given.rank}"
    config.strategy = (
        f"lora(rank={given.rank}, alpha={given.alpha}, dropout={given.dropout}, targets={given.targets!r})"
    )
    config.optim.lr = 1e-3
    return config
