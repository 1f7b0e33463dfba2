"""Writes the golden files; with the extras parity and demo: `python tests/models/make_golden.py [model …]`.

A file holds the logits of the PyTorch reference, and of its weights the statistics only, in half precision: the
others follow from the names of the tensors (`torch_reference.draw`).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import torch_reference as reference

SIZES = {
    "efficientnet_b0": 75,
    "efficientnet_lite1": 60,
    "resnet18": 70,
    "resnet50": 75,
    "vit_mini": 32,
    "vit_tiny_patch16": 224,
    "mobilenet_v2_tiny": 45,
    "mobilenet_v3_tiny": 45,
    "efficientnetv2_tiny": 45,
    "vgg_bn_tiny": 45,
    "resnext_tiny": 45,
    "resnetv2_tiny": 45,
    "inception_tiny": 96,
    "convnext_mini": 70,
    "densenet_mini": 70,
    "swin_mini": 32,
    "clip_vit_tiny": 32,
}
CLASSES = 10


def logits(net, size: int) -> np.ndarray:
    return net(reference.torch_order(reference.images(2, size))).detach().numpy()


def main(names):
    reference.GOLDEN.mkdir(exist_ok=True)
    for name in names or SIZES:
        size = SIZES[name]
        net = reference.model(name, CLASSES, size)
        tensors = reference.state_dict(net, size)
        statistics = [value for key, value in tensors.items() if reference.is_statistic(key)]
        np.savez_compressed(
            reference.GOLDEN / f"{name}.npz",
            logits=logits(net, size),
            size=size,
            statistics=np.concatenate([np.zeros(0), *statistics]).astype(np.float16),
            tensors=np.array([" ".join(map(str, (key, *value.shape))) for key, value in tensors.items()]),
        )
    if names:
        return
    net = reference.model("efficientnet_lite0", 1000, 224)
    net.load_state_dict(reference.real_lite0())
    np.savez_compressed(reference.GOLDEN / "efficientnet_lite0_real.npz", logits=logits(net, 224), size=224)


if __name__ == "__main__":
    main(sys.argv[1:])
