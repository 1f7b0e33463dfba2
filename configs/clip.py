"""Fine-tunes a CLIP from its zero-shot classifier on: the head begins as the vectors of the classes' names.

    python -m tljax.train --config=configs/clip.py
    python -m tljax.train --config=configs/clip.py:model=clip_vit_base_patch16,last=4
    python -m tljax.wise_ft --workdir=RUN

The weights come from the Hugging Face hub (`pip install -e '.[clip,hf]'`, docs/clip.md). The head is no stranger to the
features, so all steps are small, and nothing pulls its vectors to zero.
"""

from tljax.config import arguments, base


def get_config(arg=""):
    given = arguments(arg, model="clip_vit_base_patch32", last=2, body=0.1)
    config = base(given.model)
    config.name = "clip"
    config.head = "zeroshot"
    config.strategy = f"partial(last={given.last}, body={given.body})"
    config.optim.lr = 1e-4
    config.optim.weight_decay = 0.0
    config.label_smoothing = 0.0
    config.train_for = "10 epochs"
    return config
