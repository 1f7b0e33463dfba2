"""Every stage's output equals the reference's, in each naming of each architecture."""

import functools

import jax
import numpy as np
import pytest
import torch_reference as reference
import torch_zoo
from flax import traverse_util

from tljax import models
from tljax.weights import lookalike, matcher

CLASSES = 10
# (model, naming): input size; odd, so that padding differs from layer to layer.
FAST = {
    ("mobilenet_v2_tiny", "torchvision"): 45,
    ("mobilenet_v3_tiny", "torchvision"): 45,
    ("efficientnetv2_tiny", "torchvision"): 45,
    ("vgg_tiny", "torchvision"): 38,
    ("vgg_bn_tiny", "torchvision"): 45,
    ("vgg_bn_tiny", "timm"): 28,
    ("resnet18", "torchvision"): 45,
    ("resnext_tiny", "torchvision"): 45,
    ("resnetv2_tiny", "timm"): 45,
    ("inception_tiny", "torchvision"): 107,
    ("mobilenet_v2", "timm"): 39,
    ("mobilenetv3_small_100", "timm"): 39,
}
SLOW = {
    ("mobilenet_v2", "torchvision"): 224,
    ("mobilenet_v3_small", "torchvision"): 224,
    ("mobilenet_v3_large", "torchvision"): 75,
    ("mobilenetv3_large_100", "timm"): 224,
    ("tf_efficientnet_b0", "timm"): 75,
    ("timm_efficientnet_b0", "timm"): 75,
    ("timm_efficientnet_b3", "timm"): 64,
    ("tf_efficientnet_lite0", "timm"): 224,
    ("tf_efficientnetv2_s", "timm"): 75,
    ("tf_efficientnetv2_m", "timm"): 65,
    ("efficientnet_v2_s", "torchvision"): 75,
    ("efficientnet_v2_l", "torchvision"): 65,
    ("resnext50_32x4d", "torchvision"): 75,
    ("resnext101_64x4d", "torchvision"): 64,
    ("wide_resnet50_2", "torchvision"): 75,
    ("resnetv2_50x1_bit", "timm"): 75,
    ("resnetv2_101x1_bit", "timm"): 64,
    ("inception_v3", "torchvision"): 107,
    ("inception_v3_aux", "torchvision"): 299,
    ("vgg11", "torchvision"): 70,
    ("vgg13_bn", "timm"): 64,
    ("vgg16_bn", "torchvision"): 224,
    ("vgg19", "timm"): 224,
}


@pytest.mark.parametrize(
    ("name", "naming"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)  # fmt: skip
def test_the_output_of_every_stage(name, naming):
    size = (FAST | SLOW)[name, naming]
    net = reference.model(name, CLASSES, size, naming)
    flat = reference.converted(reference.table(name, naming), reference.state_dict(net, size))
    model = models.create(name, CLASSES)
    shapes = traverse_util.flatten_dict(models.shapes(model, size), sep="/")
    assert {path: value.shape for path, value in flat.items()} == {path: s.shape for path, s in shapes.items()}
    variables = {"batch_stats": {}, **traverse_util.unflatten_dict(flat, sep="/")}

    x = reference.images(2, size)
    expected = torch_zoo.outputs(net, torch_zoo.stages(net, name, naming), reference.torch_order(x))
    assert tuple(expected) == model.stages
    logits = expected["head"]
    assert np.ptp(logits, axis=0).max() > 0.03 * np.abs(logits).max()  # not the weights alone decide

    @jax.jit
    def every(variables, x):
        found = {}
        for stage, after in zip(model.stages, (*model.stages[1:], None)):
            x = found[stage] = model.apply(variables, x, start=stage, stop=after)
        return found

    for stage, got in every(variables, x).items():
        one = expected[stage].reshape(got.shape) if expected[stage].size == got.size else expected[stage]
        if got.ndim == 2 and one.ndim == 4:  # the last stage before the head comes pooled
            one = one.mean((1, 2))
        reference.assert_close(got, one)


@pytest.mark.parametrize(
    ("asked", "theirs"),
    [
        # Of the same shapes, and yet other networks: the padding or the norms' epsilon differ.
        ("mobilenet_v3_small", "mobilenetv3_small_100"),
        ("efficientnet_v2_s", "tf_efficientnetv2_s"),
        ("efficientnet_lite0", "tf_efficientnet_lite0"),
    ],
)
def test_another_library_s_twin_is_told_apart(asked, theirs):
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    with torch.device("meta"):
        net = reference.model(theirs, CLASSES, 224, "timm")
    names = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    _, table = lookalike.best_table(list(names), asked)
    shapes = matcher.flatten(models.shapes(models.create(asked, CLASSES)))
    assert matcher.fit(names, table, {path: leaf.shape for path, leaf in shapes.items()}).problems > 100
    assert lookalike.find(names, asked) == (theirs, "timm")


@pytest.mark.slow
def test_the_auxiliary_head_is_computed_where_it_is_asked_for():
    net = reference.model("inception_v3_aux", CLASSES, 299)
    flat = reference.converted(reference.table("inception_v3_aux"), reference.state_dict(net, 299))
    model, variables = models.create("inception_v3_aux", CLASSES), traverse_util.unflatten_dict(flat, sep="/")
    x = reference.images(1, 299)
    seen = torch_zoo.outputs(net, {"6e": "Mixed_6e"}, reference.torch_order(x))["6e"]
    expected = net.AuxLogits(reference.torch_order(seen)).detach().numpy()
    logits, found = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(variables, x)
    reference.assert_close(found["intermediates"]["block8"]["aux_logits"][0], expected)
    reference.assert_close(jax.jit(model.apply)(variables, x), np.asarray(logits), 1e-6)
    # Without it neither its parameters nor its products are needed.
    del variables["params"]["block8"]["aux"]
    reference.assert_close(jax.jit(model.apply)(variables, x), np.asarray(logits), 1e-6)


def test_google_s_names_are_those_that_timm_reads(tmp_path):
    """A file in the form of the published BiT .npz, read by timm's own loader and by our table."""
    name, names = "resnetv2_tiny", {}

    def norm(at, channels):
        names.update({f"{at}/gamma": (channels,), f"{at}/beta": (channels,)})

    names["resnet/root_block/standardized_conv2d/kernel"] = (7, 7, 3, 8)
    wide = 8
    for block, units, channels in ((1, 1, 8), (2, 2, 16)):
        for unit in range(1, units + 1):
            at = f"resnet/block{block}/unit{unit:02d}"
            for letter, size, inputs, outputs in (("a", 1, wide, channels), ("b", 3, channels, channels),
                                                  ("c", 1, channels, 4 * channels)):  # fmt: skip
                norm(f"{at}/{letter}/group_norm", inputs)
                names[f"{at}/{letter}/standardized_conv2d/kernel"] = (size, size, inputs, outputs)
            if unit == 1:
                names[f"{at}/a/proj/standardized_conv2d/kernel"] = (1, 1, wide, 4 * channels)
            wide = 4 * channels
    norm("resnet/group_norm", wide)
    names |= {"resnet/head/conv2d/kernel": (1, 1, wide, CLASSES), "resnet/head/conv2d/bias": (CLASSES,)}
    source = {key: reference.draw(key.replace("gamma", "weight"), shape) for key, shape in names.items()}
    np.savez(tmp_path / "bit.npz", **source)

    net = reference.model(name, CLASSES, 32, "timm")
    torch = pytest.importorskip("torch", reason=reference.EXTRA)
    with torch.no_grad():
        net.load_pretrained(str(tmp_path / "bit.npz"))
    model = models.create(name, CLASSES)
    result = matcher.fit(
        {key: value.shape for key, value in source.items()},
        models.conversion(name)["google"],
        {path: leaf.shape for path, leaf in matcher.flatten(models.shapes(model)).items()},
    )
    assert result.problems == 0
    assert lookalike.best_table(list(source), name)[0] == "google"
    variables = matcher.fill(source, result, models.shapes(model))
    x = reference.images(2, 45)
    reference.assert_close(jax.jit(model.apply)(variables, x), net(reference.torch_order(x)).detach().numpy())
