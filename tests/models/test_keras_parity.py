"""What Keras saves is read by its layers' names, and gives the logits that Keras gives for the same photographs."""

import jax
import keras_zoo
import numpy as np
import pytest
import torch_reference as reference

from tljax import models, weights
from tljax.models import naming, resnet
from tljax.weights import matcher

CLASSES = 10
NAMES = [*keras_zoo.TINY, *(pytest.param(name, marks=pytest.mark.slow) for name in keras_zoo.PUBLISHED)]


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, tmp_path):
    net, prepare, size = keras_zoo.network(name, CLASSES)
    x = keras_zoo.photographs(size)
    keras_zoo.randomise(net, prepare(x.copy()))
    expected = np.asarray(net(prepare(x.copy()), training=False))
    assert np.ptp(expected, axis=0).max() > 0.05 * np.abs(expected).max()  # not the weights alone decide
    model = models.create(name, CLASSES)
    shapes, apply = models.shapes(model, size), jax.jit(model.apply)
    for file, save in (("a.weights.h5", net.save_weights), ("a.h5", net.save)):
        save(tmp_path / file)
        card = weights.card(str(tmp_path / file), name)
        loaded = weights.load(card, name, shapes)
        assert loaded.report.naming == "keras"
        assert all("normalization" in ignored for ignored in loaded.report.ignored)
        images = (x / 255 - np.array(card.mean, np.float32)) / np.array(card.std, np.float32)
        got = apply({"params": loaded.params, "batch_stats": loaded.batch_stats}, images)
        reference.assert_close(got, expected)


def test_old_and_new_names_of_one_network():
    """Keras' ResNet-50 of 2015 calls its 320 arrays otherwise; both tables fill every leaf once."""
    kinds = {"conv": ("kernel", "bias"), "bn": ("gamma", "beta", "moving_mean", "moving_variance")}
    old, new = {}, {}

    def add(old_layer, new_layer, kind):
        for variable in kinds[kind]:
            old[f"{old_layer}/{variable}"] = new[f"{new_layer}/{new_layer}/{variable}:0"] = variable

    add("conv1", "conv1_conv", "conv")
    add("bn_conv1", "conv1_bn", "bn")
    add("fc1000", "predictions", "conv")
    for stack, depth in enumerate((3, 4, 6, 3), 2):
        for block in range(depth):
            branches = {"2a": 1, "2b": 2, "2c": 3} | ({"1": 0} if block == 0 else {})
            for letters, number in branches.items():
                for start, kind in (("res", "conv"), ("bn", "bn")):
                    add(
                        f"{start}{stack}{'abcdef'[block]}_branch{letters}",
                        f"conv{stack}_block{block + 1}_{number}_{kind}",
                        kind,
                    )
    assert len(old) == len(new) == 320
    leaves = set(matcher.flatten(models.shapes(models.create("keras_resnet50", CLASSES))))
    tables = [resnet.conversion("keras_resnet50_old")["keras_old"], resnet.conversion("keras_resnet50")["keras"]]
    found = [
        [parts[0].leaf for parts in matcher.targets(names, table).values()] for names, table in zip((old, new), tables)
    ]
    assert found[0] == found[1]
    assert set(found[0]) == leaves
    assert len(found[0]) == len(leaves)


def test_a_layer_in_a_model_in_a_model():
    """As in transfer learning with Keras, where the published network is one layer of another."""
    rows = naming.keras_layer("conv1", "stem/conv")
    for name in ("conv1/kernel", "resnet50/conv1/kernel:0", "model/resnet50/conv1/kernel:0", "layers/a/layers/conv1/0"):
        assert matcher.targets([name], rows)[name][0].leaf == "params/stem/conv/kernel", name
    for name in ("xconv1/kernel", "conv1/kernel:1", "conv1/gamma", "conv10/kernel", "layers/conv1/2"):
        assert matcher.targets([name], rows)[name] is None, name
