"""DenseNet: each stage against torchvision, timm's names, and the older names in torchvision's published files."""

import re

import jax
import numpy as np
import pytest
import torch_reference as reference
from flax import traverse_util
from safetensors.numpy import save_file

from tljax import models, weights
from tljax.models import densenet

CLASSES = 10


def stages_of(net, model, x):
    """{stage: the reference's output}; a dense layer's is what it adds, behind all that the layers before added."""
    layers = {}
    for group, depth in enumerate(model.variant.depths, 1):
        for i in range(1, depth + 1):
            layers[f"block{len(layers) + 1}"] = f"features.denseblock{group}.denselayer{i}"
    names = {"stem": "features.pool0", **{s: f"features.{s}" for s in model.stages if s.startswith("transition")}}
    found = reference.stages_of(net, names | layers | {"norm": "features.norm5", "head": ""}, x)
    found = {stage: a.transpose(0, 2, 3, 1) if a.ndim == 4 else a for stage, a in found.items()}
    outputs, x = {}, None
    for stage in model.stages:
        x = outputs[stage] = np.concatenate([x, found[stage]], axis=-1) if stage in layers else found[stage]
    outputs["norm"] = np.maximum(found["norm"], 0).mean((1, 2))
    return outputs


@pytest.mark.parametrize(
    ("name", "size"), [("densenet_mini", 70), pytest.param("densenet121", 75, marks=pytest.mark.slow)]
)
def test_the_output_of_every_stage(name, size):
    net, model, x = reference.model(name, CLASSES, size), models.create(name, CLASSES), reference.images(2, size)
    flat = reference.converted(reference.table(name), reference.state_dict(net, size))
    state = traverse_util.unflatten_dict(flat, sep="/")
    reference.assert_stages(stages_of(net, model, x), model, state, x)


def load(arrays, path):
    save_file(arrays, path)
    model = models.create("densenet_mini", CLASSES)
    return model, weights.load(str(path), "densenet_mini", models.shapes(model))


def test_files_of_timm(tmp_path):
    reference.import_torchvision()
    timm = pytest.importorskip("timm", reason=reference.EXTRA)
    net = timm.models.DenseNet(
        growth_rate=8, block_config=densenet.VARIANTS["densenet_mini"].depths, num_classes=CLASSES
    )
    net, x = net.eval(), reference.images(2, 70)
    arrays = reference.state_dict(net, 70)
    model, loaded = load(arrays, tmp_path / "model.safetensors")
    assert loaded.report.ignored == tuple(name for name in sorted(arrays) if "num_batches" in name)
    got = jax.jit(model.apply)({"params": loaded.params, "batch_stats": loaded.batch_stats}, x)
    reference.assert_close(got, net(reference.torch_order(x)).detach().numpy())


def test_older_names(tmp_path):
    """torchvision renames these on loading: norm.1 to norm1."""
    tensors, _, _ = reference.read_golden("densenet_mini")
    tensors = {name: np.asarray(array, np.float32) for name, array in tensors.items()}
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): a for name, a in tensors.items()}
    assert "features.denseblock2.denselayer3.norm.2.running_var" in older
    _, new = load(tensors, tmp_path / "new.safetensors")
    _, old = load(older, tmp_path / "old.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, old.params, new.params))
    assert jax.tree.all(jax.tree.map(np.array_equal, old.batch_stats, new.batch_stats))
