"""What every chain of stages promises: names, runs in part, live semantics, initialisation, devices, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_zoo
from flax import linen as nn
from flax import traverse_util

from tljax import models
from tljax.errors import UserError

TINY = [
    "efficientnet_tiny",
    "efficientnetv2_tiny",
    "mobilenet_v3_tiny",
    "resnet_tiny",
    "groupnorm_tiny",
    "resnetv2_tiny",
    "vgg_bn_tiny",
    "vit_mini",
    "convnext_mini",
    "densenet_mini",
    "swin_mini",
    "clip_vit_tiny",
]
CLASSES = 5


@functools.cache
def made(name):
    """Model, variables with statistics off their initial values, images [16, 32, 32, 3]."""
    model = models.create(name, CLASSES)
    variables = models.initialise(model, jax.random.key(0))
    key = jax.random.key(1)
    variables["batch_stats"] = jax.tree.map(
        lambda a: a + 0.4 * (jax.random.uniform(key, a.shape) - 0.5), variables["batch_stats"]
    )
    return model, variables, jax.random.normal(jax.random.key(2), (16, 32, 32, 3))


def norms(variables):
    flat = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    return frozenset(path.rsplit("/", 1)[0] for path in flat)


@functools.partial(jax.jit, static_argnames=("model", "live", "start", "stop"))
def train(model, variables, x, live, start=None, stop=None, key=None):
    rngs = None if key is None else {"dropout": key}
    return model.apply(variables, x, live=live, start=start, stop=stop, mutable=["batch_stats"], rngs=rngs)


@pytest.mark.parametrize("name", torch_zoo.cases(models.names()))
def test_params_are_keyed_by_the_stages_in_order(name):
    model, published, name = models.create(name, 7), name, name.removeprefix("keras_")
    shapes = models.shapes(model)
    assert tuple(shapes["params"]) == model.stages
    first = {"vit": "embed", "swi": "embed", "cli": "embed", "vgg": "block1"}
    assert model.stages[0] == first.get(name[:3], "stem")
    assert model.stages[-1] == "head"
    assert [s for s in model.stages if s.startswith("block")] == [
        f"block{i}" for i in range(1, sum(s.startswith("block") for s in model.stages) + 1)
    ]
    stats = {"/".join(k[:-1]) for k in traverse_util.flatten_dict(shapes["batch_stats"])}
    assert stats <= {"/".join(k[:-1]) for k in traverse_util.flatten_dict(shapes["params"])}
    families = ("vit", "clip", "swin", "convnext", "groupnorm", "resnetv2")
    without = name.startswith(families) or (name.startswith("vgg") and "bn" not in name)
    assert bool(stats) != without
    assert shapes["params"]["head"]["kernel"].shape[1] == 7
    assert models.input_size(published) == model.size


@pytest.mark.parametrize(
    ("name", "millions"),
    # As the papers and torchvision state them, with 1000 classes.
    [
        ("efficientnet_lite0", 4.65),
        ("efficientnet_lite4", 13.01),
        ("efficientnet_b0", 5.29),
        ("efficientnet_b7", 66.35),
        ("tf_efficientnetv2_s", 21.46),
        ("efficientnet_v2_m", 54.14),
        ("efficientnet_v2_l", 118.52),
        ("inception_v3", 23.83),
        ("inception_v3_aux", 27.16),
        ("mobilenet_v2", 3.50),
        ("mobilenet_v3_large", 5.48),
        ("mobilenet_v3_small", 2.54),
        ("resnet18", 11.69),
        ("resnet50", 25.56),
        ("resnet152", 60.19),
        ("resnext50_32x4d", 25.03),
        ("resnext101_32x8d", 88.79),
        ("resnext101_64x4d", 83.46),
        ("wide_resnet50_2", 68.88),
        ("wide_resnet101_2", 126.89),
        ("resnetv2_50x1_bit", 25.55),
        ("resnetv2_152x2_bit", 236.34),
        ("vgg11", 132.86),
        ("vgg16_bn", 138.37),
        ("vgg19", 143.67),
        ("vit_tiny_patch16", 5.72),
        ("vit_small_patch16", 22.05),
        ("vit_base_patch16", 86.57),
        ("vit_large_patch16", 304.33),
        ("vit_huge_patch14", 632.05),
        ("convnext_tiny", 28.59),
        ("convnext_small", 50.22),
        ("convnext_base", 88.59),
        ("convnext_large", 197.77),
        ("densenet121", 7.98),
        ("densenet161", 28.68),
        ("densenet169", 14.15),
        ("densenet201", 20.01),
        ("swin_tiny", 28.29),
        ("swin_small", 49.61),
        ("swin_base", 87.77),
        ("swin_large", 196.53),
    ],
)
def test_parameter_counts(name, millions):
    leaves = jax.tree.leaves(models.shapes(models.create(name, 1000))["params"])
    assert round(sum(leaf.size for leaf in leaves) / 1e6, 2) == millions


def test_unknown_names():
    with pytest.raises(UserError, match=r"unknown model 'resnet5'.*resnet50"):
        models.create("resnet5", 3)
    with pytest.raises(UserError, match="unknown model"):
        models.input_size("vgg")
    with pytest.raises(UserError, match=r"drop_rte.*nearest: drop_rate"):
        models.create("resnet_tiny", 3, drop_rte=0.1)
    with pytest.raises(UserError, match=r"drop_path_rate=0\.1: densenet121 has no residual branches"):
        models.create("densenet121", 3, drop_path_rate=0.1)
    model, variables, x = made("resnet_tiny")
    with pytest.raises(UserError, match="unknown stage 'block9'"):
        model.apply(variables, x, start="block9")
    with pytest.raises(UserError, match=r"unknown stage 'heads'.*nearest: head"):
        model.apply(variables, x, stop="heads")
    with pytest.raises(UserError, match=r"unknown leaf 'params/head/kernal'.*params/head/kernel"):
        models.initialise(model, jax.random.key(0), only=["params/head/kernal"])


@pytest.mark.parametrize(
    ("name", "size", "where"),
    [("convnext_mini", 31, "1×1 before 'block5'"), ("densenet_mini", 8, "1×1 before 'transition2'")],
)
def test_an_image_of_which_nothing_is_left(name, size, where):
    """The mean of no pixels would be no number."""
    with pytest.raises(UserError, match=f"the image is too small for this network: {where} halves it"):
        models.shapes(models.create(name, 3), size)


@pytest.mark.parametrize("name", TINY)
def test_runs_in_part_compose(name):
    model, variables, x = made(name)
    whole, _ = train(model, variables, x, live=frozenset())
    assert whole.shape == (16, CLASSES)
    assert whole.dtype == jnp.float32

    @jax.jit
    def in_two(variables, x):
        before = {stage: model.apply(variables, x, stop=stage) for stage in model.stages}
        return {stage: (y, model.apply(variables, y, start=stage)) for stage, y in before.items()}

    for stage, (before, after) in in_two(variables, x).items():
        np.testing.assert_allclose(after, whole, rtol=0, atol=1e-5)
        within = 3 if name.startswith(("vit", "clip")) and stage != "embed" else 4  # tokens, or an image
        assert before.ndim == (2 if stage in ("head", "hidden2") else within)
    features, _ = train(model, variables, x, live=frozenset(), stop="head")
    head = variables["params"]["head"]
    assert features.shape == (16, len(head["kernel"]))
    np.testing.assert_allclose(features @ head["kernel"] + head["bias"], whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_parts_apply_with_their_own_stages_only(name):
    """A cached prefix needs the variables of the rest alone."""
    model, variables, x = made(name)
    middle = model.stages[2]
    rest = {c: {s: v for s, v in tree.items() if s not in model.stages[:2]} for c, tree in variables.items()}
    whole, _ = train(model, variables, x, live=frozenset())
    before, _ = train(model, variables, x, live=frozenset(), stop=middle)
    np.testing.assert_allclose(train(model, rest, before, live=frozenset(), start=middle)[0], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_every_module_is_called_once(name):
    """An adapter around a module's `__call__` would else be at work twice."""
    model, variables, x = made(name)
    paths = []

    def count(call, args, kwargs, context):
        paths.extend([context.module.path] * (context.method_name == "__call__"))
        return call(*args, **kwargs)

    with nn.intercept_methods(count):
        jax.eval_shape(model.apply, variables, x)
    assert len(paths) == len(set(paths)) > len(model.stages)


@pytest.mark.parametrize("name", ["efficientnet_tiny", "resnet_tiny", "densenet_mini"])
def test_only_live_norms_use_and_move_statistics(name):
    model, variables, x = made(name)
    live = frozenset(path for path in norms(variables) if path.startswith(model.stages[-3] + "/"))
    assert live
    _, moved = train(model, variables, x, live=live)
    before = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    after = traverse_util.flatten_dict(moved["batch_stats"], sep="/")
    assert after.keys() == before.keys()
    for path, value in after.items():
        is_live = path.rsplit("/", 1)[0] in live
        assert np.array_equal(value, before[path]) != is_live, path
    # What a live norm normalises by is the batch: other stored statistics change nothing.
    altered = jax.tree.map(lambda a: a, variables)
    for path in live:
        stage, norm = path.split("/")
        altered["batch_stats"][stage][norm] = jax.tree.map(
            lambda a: a * 1.5 + 0.3, variables["batch_stats"][stage][norm]
        )
    np.testing.assert_allclose(
        train(model, altered, x, live=live)[0], train(model, variables, x, live=live)[0], rtol=0, atol=1e-3
    )
    assert np.abs(train(model, altered, x, live=frozenset())[0] - model.apply(variables, x)).max() > 1e-2


def test_dropout_and_stochastic_depth_only_in_live_stages():
    model, variables, x = made("efficientnet_tiny")
    model = model.clone(drop_rate=0.5, drop_path_rate=0.8)
    plain = model.apply(variables, x)
    key = jax.random.key(3)
    # Without a live stage no random number is drawn: none needs to be given.
    np.testing.assert_array_equal(
        train(model, variables, x, live=frozenset({"stem"}))[0],
        train(model, variables, x, live=frozenset())[0],
    )
    residual = "block3"  # stride 1 and as many channels out as in
    for stage in (residual, "head"):
        dropped, moved = train(model, variables, x, live=frozenset({stage}), key=key)
        assert np.abs(dropped - plain).max() > 1e-2
        assert jax.tree.all(jax.tree.map(np.array_equal, moved["batch_stats"], variables["batch_stats"]))
    # Stochastic depth passes whole examples or leaves them: a dropped one is the block's input.
    before = model.apply(variables, x, stop=residual)
    after, _ = train(model, variables, before, live=frozenset({residual}), start=residual, stop="block4", key=key)
    kept = model.apply(variables, before, start=residual, stop="block4")
    rate = 0.8 * 2 / 4  # of the third of four blocks
    dropped = np.array([np.array_equal(a, b) for a, b in zip(after, before)])
    assert 0 < dropped.sum() < len(dropped)
    scaled = before + (kept - before) / (1 - rate)
    np.testing.assert_allclose(after[~dropped], scaled[~dropped], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["efficientnet_tiny", "resnet_tiny"])
def test_pmap_equals_jit_over_the_global_batch(name):
    """Statistics over the global batch, and the same dropout masks, on eight devices as on one."""
    devices = jax.local_device_count()
    if devices < 8:
        pytest.skip("needs eight devices (JAX_NUM_CPU_DEVICES=8)")
    model, variables, x = made(name)
    model = model.clone(drop_rate=0.3, drop_path_rate=0.5)
    live, key = norms(variables) | frozenset(model.stages), jax.random.key(4)
    expected, moved = train(model, variables, x, live=live, key=key)

    spread = model.clone(axis_name="batch")

    @functools.partial(jax.pmap, axis_name="batch", in_axes=(None, 0, None), out_axes=(0, None))
    def step(variables, x, key):
        return spread.apply(variables, x, live=live, mutable=["batch_stats"], rngs={"dropout": key})

    got, got_moved = step(variables, x.reshape(8, 2, *x.shape[1:]), key)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=0, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got_moved, moved)


def test_axis_name_does_not_matter_outside_of_pmap():
    model = models.create("resnet_tiny", CLASSES, axis_name="batch")
    assert models.shapes(model) == models.shapes(models.create("resnet_tiny", CLASSES))
    models.initialise(model, jax.random.key(0), only=["params/head/bias"])


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_compute(name):
    model, variables, x = made(name)
    half = models.create(name, CLASSES, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(models.shapes(half))} == {jnp.dtype("float32")}
    expected, _ = train(model, variables, x, live=frozenset())
    got, _ = train(half, variables, x, live=frozenset())
    assert got.dtype == jnp.float32
    assert jax.eval_shape(lambda: half.apply(variables, x, stop="block2")).dtype == jnp.bfloat16
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.05 * np.abs(expected).max())
    loss = lambda params: half.apply({**variables, "params": params}, x).sum()
    grads = jax.eval_shape(jax.grad(loss), variables["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_param_dtype():
    model = models.create("resnet_tiny", CLASSES, param_dtype=jnp.bfloat16)
    shapes = models.shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["params"])} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["batch_stats"])} == {jnp.dtype("float32")}


def test_initialise_fills_the_shapes_and_only_what_is_asked():
    model, _, _ = made("efficientnet_tiny")
    shapes, key = models.shapes(model), jax.random.key(5)
    whole = models.initialise(model, key)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), whole) == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)
    assert tuple(whole["params"]) == model.stages
    wanted = ["params/head/kernel", "params/head/bias", "batch_stats/stem/bn/var"]
    part = traverse_util.flatten_dict(models.initialise(model, key, only=wanted), sep="/")
    assert part.keys() == set(wanted)
    flat = traverse_util.flatten_dict(whole, sep="/")
    for path in wanted:
        np.testing.assert_array_equal(part[path], flat[path])
    assert models.initialise(model, key, only=()) == {"params": {}, "batch_stats": {}}
    # He et al.: variance 2 over the fan-out within a group.
    for path, fan_out in {"params/top/conv/kernel": 32, "params/block2/depthwise_conv/kernel": 9}.items():
        assert abs(np.std(flat[path]) / np.sqrt(2 / fan_out) - 1) < 0.25
    other = models.initialise(model, jax.random.key(6), only=wanted)["params"]["head"]["kernel"]
    assert not np.array_equal(other, flat["params/head/kernel"])


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet50"])
def test_a_frozen_body_costs_no_backward_pass(name):
    """FLOPs of the gradient of the head are those of the forward pass; of all leaves, about three times that."""
    model = models.create(name, 14)
    shapes = models.shapes(model)
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

    def flops(trainable):
        def loss(part, x, rest):
            return model.apply({**rest, "params": {**rest["params"], **part}}, x).sum()

        part = {stage: shapes["params"][stage] for stage in trainable}
        lowered = jax.jit(jax.grad(loss)).lower(part, x, shapes)
        return lowered.cost_analysis()["flops"]

    forward = jax.jit(model.apply).lower(shapes, x).cost_analysis()["flops"]
    assert 0.99 * forward < flops(["head"]) < 1.01 * forward
    assert 2.6 * forward < flops(model.stages) < 3.4 * forward
