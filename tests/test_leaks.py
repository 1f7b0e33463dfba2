"""The lint is silent on tljax's own steps and on steps that are right, and names each known mistake in small ones."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import tljax
from tljax import config as configs
from tljax import models, optim, strategies
from tljax import plan as plans
from tljax.cost import collective_bytes
from tljax.errors import UserError
from tljax.step import init_state, make_train_step

# Blocks of one shape, so that shapes alone do not tell whose a gradient is.
BLOCK = {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32), "bias": jax.ShapeDtypeStruct((4,), jnp.float32)}
PARAMS = {"block1": BLOCK, "block2": BLOCK, "block3": BLOCK, "head": BLOCK}
PLAN = plans.build([("block1", 0), ("block2", 0), ("**", 1)], PARAMS)
BATCH = {"x": jax.ShapeDtypeStruct((8, 4), jnp.float32), "y": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
TX = optax.sgd(0.1)


def apply(params, x):
    for stage in PARAMS:
        x = jnp.tanh(x @ params[stage]["kernel"] + params[stage]["bias"])
    return x


def loss_fn(params, batch):
    return jnp.square(apply(params, batch["x"]) - batch["y"]).mean()


def lines(step, *args, plan=PLAN, **more) -> str:
    return "\n".join(map(str, tljax.lint(step, plan, *args, **more)))


def kinds(found) -> set[str]:
    return {finding.kind for finding in found}


def leaves(found) -> set[str]:
    return {leaf for finding in found for leaf in finding.leaves}


FROZEN = {leaf.path for leaf in PLAN.leaves if not leaf.multiplier}


# ---- right steps


def split_step(params, batch):
    trainable, frozen = PLAN.split(params)
    loss, grads = jax.value_and_grad(lambda t: loss_fn(PLAN.merge(t, frozen), batch))(trainable)
    trainable = jax.tree.map(lambda p, g: p - 0.1 * g * 1e-3, trainable, grads)
    return PLAN.merge(trainable, frozen), {"loss": loss, "norm": optax.tree.norm(grads)}


def stopped_early(params, batch):
    """All leaves are differentiated, but the frozen ones are constants."""
    keep = PLAN.tree(lambda leaf: bool(leaf.multiplier))
    constant = lambda params: jax.tree.map(lambda k, p: p if k else jax.lax.stop_gradient(p), keep, params)
    grads = jax.grad(lambda params: loss_fn(constant(params), batch))(params)
    norm = optax.tree.norm(grads)  # of zeros
    return jax.tree.map(lambda k, p, g: p - 0.1 * g if k else p, keep, params, grads), norm


def dropped(params, batch):
    """Gradients of all leaves are written, those of frozen ones used by nothing: dead code, which XLA removes."""
    grads = jax.grad(loss_fn)(params, batch)
    return jax.tree.map(
        lambda leaf_k, p, g: p - g if leaf_k else p, PLAN.tree(lambda leaf: leaf.multiplier), params, grads
    )


def frozen_by_transform(params, batch):
    tx = tljax.freeze(optax.adamw(1e-3), PLAN)
    state = tx.init(params)
    updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
    return optax.apply_updates(params, updates), state


def checkpointed(params, batch):
    trainable, frozen = PLAN.split(params)
    grads = jax.grad(jax.checkpoint(lambda t: loss_fn(PLAN.merge(t, frozen), batch)))(trainable)
    return PLAN.merge(jax.tree.map(jnp.subtract, trainable, grads), frozen), optax.tree.norm(grads)


@pytest.mark.parametrize("step", [split_step, stopped_early, dropped, frozen_by_transform, checkpointed])
def test_steps_that_are_right_have_no_finding(step):
    assert lines(step, PARAMS, BATCH) == ""
    assert lines(jax.jit(step, donate_argnums=0), PARAMS, BATCH) == ""


def test_two_losses_and_parts_of_a_batch_are_no_leak():
    """A leaf may have several gradients."""

    def step(params, batch):
        trainable, frozen = PLAN.split(params)
        parts = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
        grads = [jax.grad(lambda t, b=b: loss_fn(PLAN.merge(t, frozen), b))(trainable) for b in parts]
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
        stacked = jax.lax.map(
            lambda b: jax.grad(lambda t: loss_fn(PLAN.merge(t, frozen), b))(trainable),
            jax.tree.map(lambda x: x.reshape(2, 4, 4), batch),
        )
        both = jax.tree.map(lambda a, b: a + b.mean(0), mean, stacked)
        return PLAN.merge(jax.tree.map(jnp.subtract, trainable, both), frozen), optax.tree.norm(both)

    assert lines(step, PARAMS, BATCH) == ""


@functools.cache
def own_step(model, strategy, **options):
    model = models.create(model, 5, drop_rate=0.3, drop_path_rate=0.2)
    shapes = models.shapes(model, 32)
    params, stats = shapes["params"], shapes["batch_stats"]
    plan = plans.build(strategies.parse(strategy)(model.stages), params, stats, model.stages)
    config = configs.base().optim
    config.warmup = "0 steps"
    tx = optim.optimizer(plan, config, optim.learning_rate(config, 10, 5.0))
    step = make_train_step(model, plan, tx, mean=(0.5,) * 3, std=(0.2,) * 3, num_classes=5, **options)
    state = jax.eval_shape(lambda p, s: init_state(plan, tx, p, s, options.get("ema", 0.0)), params, stats)
    batch = {"image": jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((8,), jnp.int32)}
    return step, plan, state, batch


OWN = ["frozen()", "partial(last=1)", "full()", "surgical('block1')", "biases_only()", "norms_only()",
       "layerwise_decay(0.7)", "first(rules(('**/bn*', 0)), partial(last=2))"]  # fmt: skip


@pytest.mark.parametrize("model", ["efficientnet_tiny", "resnet_tiny", "groupnorm_tiny", "vit_mini", "convnext_mini"])
@pytest.mark.parametrize("strategy", OWN)
def test_the_own_step_forms_no_gradient_of_a_frozen_leaf(model, strategy):
    strategy = strategy.replace("**/bn*", "**/{bn1,norm1,downsample_norm}")  # a name that all have
    step, *rest = own_step(model, strategy)
    assert lines(step, *rest[1:], plan=rest[0]) == ""


def test_the_own_step_with_all_options():
    step, *rest = own_step(
        "resnet_tiny", "partial(last=1)", smoothing=0.1, mixup=0.3, cutmix=1.0, ema=0.9, accumulate=2
    )
    assert lines(step, *rest[1:], plan=rest[0]) == ""


# ---- mistakes


def masked(params, grads, norm=0.0):
    """An update that is right in itself."""
    trains = PLAN.tree(lambda leaf: bool(leaf.multiplier))
    return jax.tree.map(lambda k, p, g: p - 0.1 * g / (1 + norm) if k else p, trains, params, grads)


def clip_over_all(params, batch):
    grads = jax.grad(loss_fn)(params, batch)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tljax.freeze(TX, PLAN))
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


def logged_norm(params, batch):
    grads = jax.grad(loss_fn)(params, batch)
    return masked(params, grads), {"grad_norm": optax.tree.norm(grads)}


def multiplied_by_zero(params, batch):
    grads = jax.grad(loss_fn)(params, batch)
    return jax.tree.map(lambda m, p, g: p - 0.1 * m * g, PLAN.tree(lambda leaf: leaf.multiplier), params, grads)


def updated(params, batch):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss_fn)(params, batch))


def finite(params, batch):
    grads = jax.grad(loss_fn)(params, batch)
    good = jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), masked(params, grads), params)


def stopped_behind_the_backward_pass(params, batch):
    """stop_gradient on what is already a gradient: it stops nothing."""
    grads = jax.grad(loss_fn)(params, batch)
    stop = lambda k, g: g if k else jax.lax.stop_gradient(g)
    grads = jax.tree.map(stop, PLAN.tree(lambda leaf: bool(leaf.multiplier)), grads)
    return masked(params, grads, optax.tree.norm(grads))


@pytest.mark.parametrize(
    ("step", "kind", "code"),
    [
        (clip_over_all, "gradient", "clip_over_all"),
        (logged_norm, "gradient", "logged_norm"),
        (multiplied_by_zero, "gradient", "multiplied_by_zero"),
        (updated, "change", "updated"),
        (finite, "gradient", "finite"),
        (stopped_behind_the_backward_pass, "activations", "apply|loss_fn"),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_gradients_that_are_used(step, kind, code, jitted):
    found = tljax.lint(jax.jit(step) if jitted else step, PLAN, PARAMS, BATCH)
    assert kind in kinds(found)
    assert leaves(found) == FROZEN
    for finding in found:
        assert re.fullmatch(r"[^\n]+, at test_leaks\.py:\d+ \(.+\)", str(finding))
    assert re.search(code, "\n".join(f.where for f in found if f.kind == kind))
    # The compiler agrees: the gradients are computed.
    flops = lambda f: jax.jit(f).lower(PARAMS, BATCH).compile().cost_analysis()["flops"]
    assert flops(step) > flops(split_step)
    assert "activations" in kinds(found)  # tanh of the frozen blocks


def test_decay_outside_the_mask():
    def step(params, batch):
        tx = optax.chain(tljax.freeze(TX, PLAN), optax.add_decayed_weights(-1e-4))
        updates, _ = tx.update(jax.grad(loss_fn)(params, batch), tx.init(params), params)
        return optax.apply_updates(params, updates)

    found = tljax.lint(step, PLAN, PARAMS, BATCH)
    assert kinds(found) == {"change"}
    assert leaves(found) == FROZEN
    assert "frozen block1/kernel does not leave the step as it came, at test_leaks.py" in lines(step, PARAMS, BATCH)


def test_optimizer_state_for_frozen_leaves():
    zeroed = optax.chain(
        optax.masked(optax.set_to_zero(), PLAN.tree(lambda leaf: not leaf.multiplier)), optax.scale_by_adam()
    )

    def step(params, optimizer, batch, tx):
        grads = jax.grad(loss_fn)(params, batch)
        updates, optimizer = tx.update(grads, optimizer, params)
        return masked(params, updates), optimizer

    run = functools.partial(step, tx=zeroed)
    state = jax.eval_shape(zeroed.init, PARAMS)
    found = tljax.lint(run, PLAN, PARAMS, state, BATCH)
    assert kinds(found) == {"state"}  # no gradient is formed, but moments are kept and decayed
    assert leaves(found) == FROZEN
    assert len(found) == 2 * len(FROZEN)
    assert "mu/block1/kernel" in "\n".join(map(str, found))

    run = functools.partial(step, tx=optax.scale_by_adam())
    found = tljax.lint(run, PLAN, PARAMS, jax.eval_shape(optax.scale_by_adam().init, PARAMS), BATCH)
    assert kinds(found) == {"gradient", "state", "activations"}

    right = optax.masked(optax.scale_by_adam(), PLAN.tree(lambda leaf: bool(leaf.multiplier)))
    run = functools.partial(step, tx=right)
    assert lines(run, PARAMS, jax.eval_shape(right.init, PARAMS), BATCH) == ""


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
@pytest.mark.parametrize("mistake", [False, True])
def test_a_collective_over_all_gradients(how, mistake):
    def step(params, batch):
        trainable, frozen = PLAN.split(params)
        if mistake:
            grads = jax.lax.pmean(jax.grad(loss_fn)(params, batch), "devices")
            largest = jax.tree.reduce(jnp.maximum, jax.tree.map(jnp.max, grads))
            grads = PLAN.split(grads)[0]
        else:
            grads = jax.lax.pmean(jax.grad(lambda t: loss_fn(PLAN.merge(t, frozen), batch))(trainable), "devices")
            largest = jax.tree.reduce(jnp.maximum, jax.tree.map(jnp.max, grads))
        return PLAN.merge(jax.tree.map(jnp.subtract, trainable, grads), frozen), largest

    devices, batch = jax.devices()[:2], BATCH
    if how == "pmap":
        step = jax.pmap(step, "devices", in_axes=(None, 0), out_axes=None, devices=devices)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, 4, 4), x.dtype), BATCH)
    else:
        specs = (PartitionSpec(), PartitionSpec("devices"))
        step = jax.shard_map(
            step, mesh=Mesh(np.array(devices), "devices"), in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
    found = tljax.lint(step, PLAN, PARAMS, batch)
    assert kinds(found) == ({"collective", "activations"} if mistake else set())
    assert leaves(found) == (FROZEN if mistake else set())


def test_a_collective_whose_frozen_part_is_dropped_is_no_finding_and_no_traffic():
    """The mean of all gradients is written, that of frozen ones used by nothing: the compiler moves no byte of it."""

    def step(params, batch):
        grads = jax.lax.pmean(jax.grad(loss_fn)(params, batch), "devices")
        return masked(params, grads)

    mesh = Mesh(np.array(jax.devices()[:2]), "devices")
    specs = PartitionSpec(), PartitionSpec("devices")
    step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    assert lines(step, PARAMS, BATCH) == ""
    moved = collective_bytes(jax.jit(step).lower(PARAMS, BATCH).compile())
    assert moved == {"all-reduce": sum(leaf.nbytes for leaf in PLAN.trainable)}


def test_a_stop_gradient_before_a_scan_comes_too_late():
    """Frozen and trainable layers as one array: the backward pass cannot tell them apart, and runs through all."""

    def step(params, batch, stack):
        def loss(trainable):
            kernels = [trainable.get(s, params[s])["kernel"] for s in PARAMS]
            kernels = [k if s in trainable else jax.lax.stop_gradient(k) for s, k in zip(PARAMS, kernels)]
            layer = lambda x, kernel: (jnp.tanh(x @ kernel), None)
            if stack:
                x, _ = jax.lax.scan(layer, batch["x"], jnp.stack(kernels))
            else:
                x, _ = jax.lax.scan(layer, batch["x"], jnp.stack(kernels[:2]))
                x, _ = jax.lax.scan(layer, x, jnp.stack(kernels[2:]))
            return jnp.square(x - batch["y"]).mean()

        trainable = {s: params[s] for s in ("block3", "head")}
        return params | jax.tree.map(jnp.subtract, trainable, jax.grad(loss)(trainable))

    found = tljax.lint(functools.partial(step, stack=True), PLAN, PARAMS, BATCH)
    assert kinds(found) == {"activations"}
    assert leaves(found) == {"block1/kernel", "block2/kernel"}
    assert "comes too late" in str(found[0])
    assert lines(functools.partial(step, stack=False), PARAMS, BATCH) == ""
    # The compiler agrees: the scan over all keeps the activations of all.
    size = lambda stack: (
        jax.jit(functools.partial(step, stack=stack))
        .lower(PARAMS, jax.tree.map(lambda x: jax.ShapeDtypeStruct((4096, 4), x.dtype), BATCH))
        .compile().memory_analysis().temp_size_in_bytes
    )  # fmt: skip
    assert size(True) > size(False)


def test_a_mistake_within_accumulation_is_seen():
    def step(params, batch):
        def add(total, part):
            grads = jax.grad(loss_fn)(params, part)
            return jax.tree.map(jnp.add, total, grads), None

        parts = jax.tree.map(lambda x: x.reshape(2, 4, 4), batch)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape), params)
        grads, _ = jax.lax.scan(add, zeros, parts)
        return masked(params, grads), optax.tree.norm(grads)

    found = tljax.lint(step, PLAN, PARAMS, BATCH)
    assert leaves(found) == FROZEN
    dead = tljax.lint(lambda *args: step(*args)[0], PLAN, PARAMS, BATCH)
    assert dead == ()  # the scan's sums of frozen gradients are dead code too


def test_with_flax_the_module_is_named_though_others_have_its_shape():
    step, plan, state, batch = own_step("resnet_tiny", "surgical('block1')")
    model = models.create("resnet_tiny", 5)

    def leaking(state, batch):
        def loss(params):
            x = batch["image"].astype(jnp.float32)
            logits = model.apply({"params": params, "batch_stats": state.stats}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        grads = jax.grad(loss)(state.params)
        norm = jnp.sqrt(jnp.sum(jnp.square(grads["block2"]["bn1"]["bias"])))
        new, metrics = step(state, batch)
        return new, metrics | {"norm": norm}

    found = tljax.lint(leaking, plan, state, batch)
    assert [f.leaves for f in found if f.kind == "gradient"] == [("block2/bn1/bias", "block2/bn1/scale")]


def test_parted_parameters_and_places():
    trainable, frozen = PLAN.split(PARAMS)
    moments = jax.tree.map(lambda x: x, PARAMS)

    def step(moments, trainable, frozen, batch):
        grads = jax.grad(lambda t: loss_fn(PLAN.merge(t, frozen), batch))(trainable)
        return moments, jax.tree.map(jnp.subtract, trainable, grads)

    # Two arguments hold all frozen leaves: the first is taken, or the one that is named.
    assert lines(step, moments, trainable, frozen, BATCH, params="2") == ""
    with pytest.raises(UserError, match=r"no argument holds the frozen leaves under '1'.*they are under 0, 2"):
        tljax.lint(step, PLAN, moments, trainable, frozen, BATCH, params="1")
    with pytest.raises(UserError, match="no argument holds the frozen leaves"):
        tljax.lint(lambda batch: batch["x"].sum(), PLAN, BATCH)


def test_silence_is_never_for_want_of_looking(monkeypatch):
    """A step without a backward pass, or a JAX that marks it otherwise, is an error and not a clean bill."""
    with pytest.raises(UserError, match="nothing was looked at"):
        tljax.lint(loss_fn, PLAN, PARAMS, BATCH)
    monkeypatch.setattr("tljax.dataflow.backward", lambda eqn: False)
    with pytest.raises(UserError, match="nothing was looked at"):
        tljax.lint(split_step, PLAN, PARAMS, BATCH)
