"""ConvNeXt: each stage against timm, and the files of timm, torchvision, transformers and the authors."""

import jax
import numpy as np
import pytest
import torch_reference as reference
from flax import traverse_util
from safetensors.numpy import save_file

from tljax import models, weights
from tljax.models import convnext

CLASSES = 10
MINI = convnext.VARIANTS["convnext_mini"]


def modules(depths):
    """{stage: timm's module whose output is the stage's}."""
    blocks = [f"stages.{level}.blocks.{i}" for level, depth in enumerate(depths) for i in range(depth)]
    return {
        "stem": "stem",
        **{f"block{n}": name for n, name in enumerate(blocks, 1)},
        "norm": "head.flatten",
        "head": "",
    }


@pytest.mark.parametrize(
    ("name", "size"), [("convnext_mini", 70), pytest.param("convnext_tiny", 96, marks=pytest.mark.slow)]
)
def test_the_output_of_every_stage(name, size):
    net = reference.model(name, CLASSES, size)
    flat = reference.converted(reference.table(name), reference.state_dict(net, size))
    x = reference.images(2, size)
    expected = reference.stages_of(net, modules(convnext.VARIANTS[name].depths), x)
    expected = {stage: a.transpose(0, 2, 3, 1) if a.ndim == 4 else a for stage, a in expected.items()}
    reference.assert_stages(expected, models.create(name, CLASSES), traverse_util.unflatten_dict(flat, sep="/"), x)


def assert_loads(arrays, naming, path, expected, x):
    """The file fits convnext_mini strictly, its naming is found out, and its logits are the reference's."""
    save_file(arrays, path)
    model = models.create("convnext_mini", CLASSES)
    loaded = weights.load(str(path), "convnext_mini", models.shapes(model))
    assert loaded.report.naming == naming
    assert loaded.report.numbers == sum(array.size for array in arrays.values())
    reference.assert_close(jax.jit(model.apply)({"params": loaded.params}, x), expected.detach().numpy())


def test_files_of_torchvision(tmp_path):
    module = reference.import_torchvision().models.convnext
    setting = [
        module.CNBlockConfig(width, following, depth)
        for width, following, depth in zip(MINI.widths, (*MINI.widths[1:], None), MINI.depths)
    ]
    net, x = module.ConvNeXt(setting, num_classes=CLASSES).eval(), reference.images(2, 70)
    arrays = reference.state_dict(net, 70)
    assert_loads(arrays, "torchvision", tmp_path / "model.safetensors", net(reference.torch_order(x)), x)


def test_files_of_transformers(tmp_path):
    """Written by the library itself."""
    reference.import_torchvision()
    transformers = pytest.importorskip("transformers", reason=reference.EXTRA)
    config = transformers.ConvNextConfig(
        depths=MINI.depths, hidden_sizes=MINI.widths, num_labels=CLASSES, layer_norm_eps=1e-6
    )
    net, x = transformers.ConvNextForImageClassification(config).eval(), reference.images(2, 70)
    reference.fill(net)
    net.save_pretrained(tmp_path)
    arrays = weights.read(tmp_path / "model.safetensors")
    logits = net(reference.torch_order(x)).logits
    assert_loads(arrays, "transformers", tmp_path / "again.safetensors", logits, x)


def test_files_of_the_authors(tmp_path):
    """In their names, as timm's own conversion understands them."""
    net, x = reference.model("convnext_mini", CLASSES, 70), reference.images(2, 70)
    from timm.models.convnext import checkpoint_filter_fn

    layers = [f"downsample_layers.{level}.{i}" for level in range(4) for i in range(2)] + ["norm", "head"]
    gammas = []
    for level, depth in enumerate(MINI.depths):
        for i in range(depth):
            block = f"stages.{level}.{i}"
            layers += [f"{block}.{layer}" for layer in ("dwconv", "norm", "pwconv1", "pwconv2")]
            gammas.append(f"{block}.gamma")
    theirs = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")] + gammas
    arrays = reference.state_dict(net, 70)
    # What their conversion calls each of these names, asked one by one.
    renamed = {name: next(iter(checkpoint_filter_fn({name: np.zeros(1)}, net))) for name in theirs}
    assert sorted(renamed.values()) == sorted(arrays)
    arrays = {name: arrays[timm] for name, timm in renamed.items()}
    assert_loads(arrays, "facebook", tmp_path / "model.safetensors", net(reference.torch_order(x)), x)
