"""The two sides of the benchmarks of steps compute the same: as many parameters train, cut at the same place."""

import sys
from pathlib import Path

import pytest
from torch_zoo import import_timm

from tljax import config as configs
from tljax import experiment

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))
import sides

CLASSES = 10


@pytest.mark.parametrize("name", ["efficientnet_lite0", "vit_tiny_patch16"])
def test_what_trains_in_pytorch_is_what_trains_here(name):
    timm = import_timm()
    import torch

    size, strategies = 64, [s for s in sides.STRATEGIES if s != "LoRA" or name.startswith("vit")]
    x = torch.randn(2, 3, size, size)
    sized = {"img_size": size} if name.startswith("vit") else {}
    for strategy in strategies:
        net = timm.create_model(sides.NETWORKS[name], num_classes=CLASSES, **sized).eval()
        with torch.no_grad():
            whole = net(x)
            frozen, trained = sides.parts(net, strategy)
            if strategy == "LoRA":
                sides.low_rank(trained)
            torch.testing.assert_close(trained(frozen(x)), whole)
        config = configs.base(name)
        config.weights, config.reset, config.image_size = "", (), size
        config.strategy = sides.STRATEGIES[strategy]
        exp = experiment.build(config, CLASSES)
        plan = exp.plans[0][1]
        assert sum(p.numel() for p in trained.parameters() if p.requires_grad) == plan.totals()["trainable"]
        assert sum(p.numel() for p in frozen.parameters() if p.requires_grad) == 0
        behind = exp.model.stages.index(plan.cut) if plan.cut else 0
        assert len(frozen) == (0 if strategy == "LoRA" else behind)
