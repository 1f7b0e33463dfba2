"""The smallest whole experiment: a tiny network with random weights on a folder of coloured squares."""

from tljax.config import base


def get_config():
    config = base()
    config.name = "tiny"
    config.model = "resnet_tiny"
    config.weights = ""
    config.strategy = "partial(last=1)"
    config.train_for = "24 steps"
    config.batch_size = 8
    config.data.source = "folder:photos"
    config.optim.lr = 0.01
    config.optim.warmup = "2 steps"
    config.log_every = "4 steps"
    config.eval_every = "8 steps"
    config.checkpoint_every = "6 steps"
    config.parallel.members = 1  # of the eight fake devices
    return config
