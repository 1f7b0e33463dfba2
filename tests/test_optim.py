"""The optimizer recomputed by hand, in numpy, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax import config as configs
from tljax import optim
from tljax import plan as plans
from tljax.errors import UserError

RNG = np.random.default_rng(0)
SHAPES = {
    "stem": {"kernel": (3, 4)},
    "block": {"kernel": (4, 4), "bias": (4,)},
    "head": {"kernel": (4, 2), "bias": (2,)},
}
PARAMS = jax.tree.map(lambda s: RNG.normal(size=s).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
GRADS = [jax.tree.map(lambda p: 3 * RNG.normal(size=p.shape).astype(np.float32), PARAMS) for _ in range(4)]
RULES = [("stem", 0), ("block", 0.25), ("head", 1)]
PLAN = plans.build(RULES, PARAMS)


def settings_of(**changes):
    config = configs.base().optim
    config.update(changes)
    return config


def by_hand(config, params, grads, plan, lr):
    """AdamW, SGD with Nesterov momentum, and LAMB over flat dicts of float64; the textbook formulas."""
    flat = lambda tree: dict(zip(plans.paths(tree), map(np.float64, jax.tree.leaves(tree))))
    leaves = {leaf.path: leaf for leaf in plan.leaves if leaf.multiplier}
    p = {k: v for k, v in flat(params).items() if k in leaves}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t, tree in enumerate(grads, 1):
        g = {k: x for k, x in flat(tree).items() if k in leaves}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        if config.clip:
            g = {k: x * min(1, config.clip / norm) for k, x in g.items()}
        for k, leaf in leaves.items():
            if config.name == "sgd":
                m[k] = config.momentum * m[k] + g[k]
                u = g[k] + config.momentum * m[k]
            else:
                m[k] = config.b1 * m[k] + (1 - config.b1) * g[k]
                v[k] = config.b2 * v[k] + (1 - config.b2) * g[k] ** 2
                eps = 1e-8 if config.name == "adamw" else 1e-6
                u = m[k] / (1 - config.b1**t) / (np.sqrt(v[k] / (1 - config.b2**t)) + eps)
            u = u + config.weight_decay * p[k] * (leaf.path.endswith("kernel"))
            if config.name == "lamb":
                a, b = np.linalg.norm(p[k]), np.linalg.norm(u)
                u = u * (a / b if a > 0 and b > 0 else 1)
            p[k] = p[k] - lr(t - 1) * leaf.multiplier * u
    return p


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_updates_equal_the_textbook(name, clip):
    config = settings_of(name=name, clip=clip, weight_decay=0.1)
    lr = lambda t: 0.01 * (t + 1)
    tx = optim.optimizer(PLAN, config, lr)
    trainable, frozen = PLAN.split(PARAMS)
    state = tx.init(trainable)
    for grads in GRADS:
        updates, state = tx.update(PLAN.split(grads)[0], state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    expected = by_hand(config, PARAMS, GRADS, PLAN, lr)
    merged = PLAN.merge(trainable, frozen)
    for path, value in zip(plans.paths(merged), jax.tree.leaves(merged)):
        if path in expected:
            np.testing.assert_allclose(value, expected[path], rtol=2e-5, atol=1e-6, err_msg=path)
    assert merged["stem"]["kernel"] is PARAMS["stem"]["kernel"]


def test_the_optimizer_holds_the_trainable_leaves_and_nothing_else():
    config = settings_of(name="adamw")
    per_leaf, total = optim.state_bytes(optim.optimizer(PLAN, config, lambda t: 1.0), PLAN)
    trained = 4 * (16 + 4 + 8 + 2)
    assert per_leaf == {"block/bias": 32, "block/kernel": 128, "head/bias": 16, "head/kernel": 64}
    assert sum(per_leaf.values()) == 2 * trained
    assert total == 2 * trained + 4 + 4  # and two step counts: Adam's and the schedule's


@settings(max_examples=30, deadline=None)
@given(
    multipliers=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=3, max_size=3).filter(any),
    seed=st.integers(0, 99),
)
def test_freeze_gives_zero_for_frozen_leaves_and_scaled_updates_for_others(multipliers, seed):
    rng = np.random.default_rng(seed)
    plan = plans.build(list(zip(("stem", "block", "head"), multipliers)), PARAMS)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))
    tx = optim.freeze(inner, plan)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    # The same inner optimizer on the trainable leaves alone.
    trainable, train_grads = plan.split(PARAMS)[0], plan.split(grads)[0]
    alone, _ = inner.update(train_grads, inner.init(trainable), trainable)
    alone = dict(zip(plans.paths(alone), jax.tree.leaves(alone)))
    for leaf, update in zip(plan.leaves, jax.tree.leaves(updates)):
        expected = leaf.multiplier * alone[leaf.path] if leaf.multiplier else np.zeros(leaf.shape)
        np.testing.assert_allclose(update, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, *(0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)))]),
    ],
)
def test_schedules(schedule, expected):
    config = settings_of(lr=1.0, schedule=schedule, warmup="4 steps")
    lr = optim.learning_rate(config, 8, 4.0)
    assert [float(lr(t)) for t in range(8)] == pytest.approx(expected)
    in_epochs = optim.learning_rate(settings_of(lr=1.0, schedule=schedule, warmup="2 epochs"), 8, 2.0)
    assert [float(in_epochs(t)) for t in range(8)] == pytest.approx(expected)
    assert float(optim.learning_rate(settings_of(lr=1.0, warmup="0 steps"), 8, 2.0)(0)) == 1.0


@pytest.mark.parametrize(("total", "cut_frac"), [(50, 0.1), (200, 0.25), (10, 0.5)])
def test_the_slanted_triangle_is_the_papers(total, cut_frac):
    """Howard & Ruder (2018), equation 3, where cut_frac gives a whole number of steps."""
    cut, ratio, highest = int(total * cut_frac), 32, 0.01
    config = settings_of(lr=highest, schedule="slanted_triangular", warmup=f"{100 * cut_frac:g} %")
    lr = optim.learning_rate(config, total, 7.0)
    for t in range(total):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        assert float(lr(t)) == pytest.approx(highest * (1 + p * (ratio - 1)) / ratio, rel=1e-5)
    assert float(lr(0)) == pytest.approx(highest / ratio)
    assert max(float(lr(t)) for t in range(total)) == pytest.approx(highest) == float(lr(cut))


@pytest.mark.parametrize("total", [1, 7, 23, 109])
def test_the_slanted_triangle_stays_above_its_least(total):
    """Where the cut is rounded the paper's own formula falls below 0 in the end: 109 steps, cut 10, at step 104."""
    lr = optim.learning_rate(settings_of(lr=1.0, schedule="slanted_triangular", warmup="10 %"), total, 7.0)
    rates = [float(lr(t)) for t in range(total + 1)]
    assert min(rates[:-1]) >= rates[-1] - 1e-6
    assert rates[-1] == pytest.approx(1 / 32)
    assert np.argmax(rates) == round(total / 10)


@pytest.mark.parametrize(("warmup", "steps"), [("25 %", 5), ("0 %", 0), ("12.5%", 2), ("3 steps", 3)])
def test_a_warm_up_may_be_a_share(warmup, steps):
    lr = optim.learning_rate(settings_of(lr=1.0, schedule="constant", warmup=warmup), 20, 3.0)
    assert [float(lr(t)) for t in range(20)] == pytest.approx([min((t + 1) / max(steps, 1), 1) for t in range(20)])


@pytest.mark.parametrize("warmup", ["100 %", "130 %"])
def test_a_share_that_leaves_nothing_is_refused(warmup):
    with pytest.raises(UserError, match="the run has 8"):
        optim.learning_rate(settings_of(warmup=warmup), 8, 4.0)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="is 8 steps, the run has 8"):
        optim.learning_rate(settings_of(warmup="2 epochs"), 8, 4.0)


def test_bfloat16_parameters_keep_their_dtype():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    plan = plans.build(RULES, params)
    tx = optim.optimizer(plan, settings_of(), lambda t: 0.1)
    trainable = plan.split(params)[0]
    updates, _ = tx.update(trainable, tx.init(trainable), trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.apply_updates(trainable, updates))} == {jnp.dtype("bfloat16")}
