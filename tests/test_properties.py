"""Laws that hold for every tree, every rule and every optimizer: drawn at random, run through the real step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax import config as configs
from tljax import optim, strategies
from tljax import plan as plans
from tljax.step import evaluated, init_state, make_train_step

KEYS = ("kernel", "bias", "scale", "embedding")
shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
modules = st.dictionaries(st.sampled_from(KEYS), shapes, min_size=1, max_size=2)
stages = st.dictionaries(st.sampled_from(("conv", "norm", "mlp")), modules, min_size=1, max_size=2)
trees = st.dictionaries(st.sampled_from(("stem", "block1", "block10", "head")), stages, min_size=1, max_size=3)
# 0 three times: about half of the leaves are frozen.
multipliers = st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.5, 1.0])


@st.composite
def planned(draw, modes=("plan",)):
    """(plan, params, statistics): random shapes, and a rule a leaf in random order."""
    tree = draw(trees)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    is_shape = lambda x: isinstance(x, tuple)
    params = jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), tree, is_leaf=is_shape)
    stats = {s: {"norm": {"mean": rng.normal(size=3).astype(np.float32)}} for s in tree if "norm" in tree[s]}
    names = plans.paths(params)
    rules = [(name, draw(multipliers)) for name in names]
    if not any(m for _, m in rules):
        rules[0] = (names[0], 1.0)
    return (
        plans.build(draw(st.permutations(rules)), params, stats, norm_stats=draw(st.sampled_from(modes))),
        params,
        stats,
    )


class Toy:
    """A function of every leaf of any tree, called as the models are; a norm's mean follows the images'."""

    def apply(self, variables, x, live=frozenset(), rngs=None, mutable=()):
        inputs = x.mean((1, 2))  # [batch, 3]
        logits = jnp.zeros((len(x), 3))
        for i, leaf in enumerate(jax.tree.leaves(variables["params"])):
            weights = jnp.cos(1.0 + jnp.arange(leaf.size).reshape(leaf.shape) + i)
            logits += jnp.sin(0.3 * i + (leaf * weights).sum()) * jnp.roll(inputs, i, axis=1) * (i + 1)
        stats = variables["batch_stats"]
        for stage, norm in stats.items():
            if f"{stage}/norm" in live:
                mean = 0.9 * norm["norm"]["mean"] + 0.1 * inputs.mean(0)
                stats = stats | {stage: {"norm": {"mean": mean}}}
        return logits, {"batch_stats": stats}


RNG = np.random.default_rng(0)
BATCHES = [
    {"image": RNG.integers(0, 256, (8, 2, 2, 3), dtype=np.uint8), "label": RNG.integers(0, 3, 8, dtype=np.int32)}
    for _ in range(3)
]


def optimizer_config(**changes):
    config = configs.base().optim
    config.update({"lr": 0.05, "warmup": "0 steps"} | changes)
    return config


@settings(max_examples=10, deadline=None)
@given(
    made=planned(plans.NORM_STATS),
    name=st.sampled_from(["adamw", "sgd", "lamb"]),
    decay=st.sampled_from([0.0, 0.5]),
    clip=st.sampled_from([0.0, 0.1]),
    ema=st.sampled_from([0.0, 0.9]),
    accumulate=st.sampled_from([1, 2]),
    schedule=st.sampled_from(["cosine", "linear", "constant", "slanted_triangular"]),
    mixup=st.sampled_from([0.0, 0.5]),
)
def test_what_is_frozen_stays_bit_for_bit(made, name, decay, clip, ema, accumulate, schedule, mixup):
    """Decay, momentum, clip, moving average, accumulation and a schedule; parameters and statistics."""
    plan, params, stats = made
    config = optimizer_config(name=name, weight_decay=decay, clip=clip, schedule=schedule)
    tx = optim.optimizer(plan, config, optim.learning_rate(config, 8, 4.0))
    step = jax.jit(
        make_train_step(
            Toy(), plan, tx, mean=(0.5,) * 3, std=(0.2,) * 3, num_classes=3, ema=ema, accumulate=accumulate, mixup=mixup
        )
    )
    state = init_state(plan, tx, params, stats, ema)
    for batch in BATCHES:
        state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    before = plan.frozen_digests(params, stats)
    assert plan.frozen_digests(state.params, state.stats) == before
    assert plan.frozen_digests(*evaluated(state, plan)) == before
    old, new = (dict(zip(plans.paths(tree), map(np.asarray, jax.tree.leaves(tree)))) for tree in (params, state.params))
    assert {p for p in old if old[p].tobytes() != new[p].tobytes()} <= {leaf.path for leaf in plan.trainable}
    if name == "adamw":  # whose updates do not vanish with the gradient
        assert all(old[leaf.path].tobytes() != new[leaf.path].tobytes() for leaf in plan.trainable)
    moved = {p for p, a, b in zip(plans.paths(stats), *map(jax.tree.leaves, (stats, state.stats))) if (a != b).any()}
    assert {p.rpartition("/")[0] for p in moved} == plan.live_norms


@settings(max_examples=50, deadline=None)
@given(made=planned(), name=st.sampled_from(["adamw", "sgd", "lamb"]), births=st.integers(0, 3))
def test_the_optimizers_bytes_are_the_trainable_share(made, name, births):
    """Two moments a value with Adam and LAMB, one with SGD, and some counts of steps: counted on the state itself."""
    plan, params, _ = made
    ages = {leaf.path: i % (births + 1) for i, leaf in enumerate(plan.trainable)}
    tx = optim.optimizer(plan, optimizer_config(name=name), lambda t: 1.0, ages)
    state = tx.init(plan.split(params)[0])
    moments = 1 if name == "sgd" else 2
    trained = sum(leaf.size for leaf in plan.trainable)
    counts = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer)]
    values = [x for x in jax.tree.leaves(state) if not jnp.issubdtype(x.dtype, jnp.integer)]
    assert sum(x.nbytes for x in values) == 4 * moments * trained
    assert all(x.size == 1 for x in counts)
    assert len(counts) == 1 + (len(set(ages.values())) if moments == 2 else 0)  # the schedule's, and Adam's a age
    per_leaf, total = optim.state_bytes(tx, plan)
    assert per_leaf == {leaf.path: moments * leaf.nbytes for leaf in plan.trainable}
    assert total == sum(x.nbytes for x in jax.tree.leaves(state))
    assert total - 4 * len(counts) == moments * 4 * plan.totals()["trainable"]


@settings(max_examples=50, deadline=None)
@given(made=planned(), clip=st.floats(0.01, 10), seed=st.integers(0, 999))
def test_the_clip_is_by_the_norm_of_what_trains_alone(made, clip, seed):
    """The frozen gradients that `freeze` is handed are huge: a norm that counted them would leave nothing."""
    plan, params, _ = made
    rng = np.random.default_rng(seed)
    sizes = plan.tree(lambda leaf: 1.0 if leaf.multiplier else 1e6)
    grads = jax.tree.map(lambda p, size: (size * rng.normal(size=p.shape)).astype(np.float32), params, sizes)
    flat = dict(zip(plans.paths(grads), jax.tree.leaves(grads)))
    norm = np.sqrt(sum(np.square(np.float64(flat[leaf.path])).sum() for leaf in plan.trainable))
    config = optimizer_config(name="sgd", momentum=0.0, weight_decay=0.0, clip=clip)
    alone = optim.optimizer(plan, config, lambda t: 1.0)
    whole = optim.freeze(optax.chain(optax.clip_by_global_norm(clip), optax.sgd(1.0)), plan)
    trainable = plan.split(params)[0]
    for tx, given_params, given_grads in ((alone, trainable, plan.split(grads)[0]), (whole, params, grads)):
        updates, _ = tx.update(given_grads, tx.init(given_params), given_params)
        updates = dict(zip(plans.paths(updates), jax.tree.leaves(updates)))
        for leaf in plan.trainable:
            expected = -leaf.multiplier * np.float64(flat[leaf.path]) * min(1.0, clip / norm)
            np.testing.assert_allclose(updates[leaf.path], expected, rtol=2e-5, atol=1e-30)


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 12), rate=st.floats(0.3, 1.0), name=st.sampled_from(["adamw", "sgd"]), lr=st.floats(1e-4, 1)
)
def test_updates_fall_by_the_rate_from_stage_to_stage(depth, rate, name, lr):
    """Where the gradients of all stages are equal their updates are as rate**k, to float32 precision."""
    names = (*(f"block{i}" for i in range(depth)), "head")
    params = {stage: {"kernel": np.full((2, 2), 0.5, np.float32)} for stage in names}
    plan = plans.build(strategies.layerwise_decay(rate)(names), params, stages=names)
    tx = optim.optimizer(plan, optimizer_config(name=name, weight_decay=0.1), lambda t: lr)
    grads = {stage: {"kernel": np.arange(1.0, 5, dtype=np.float32).reshape(2, 2)} for stage in names}
    updates, _ = tx.update(grads, tx.init(params), params)
    head = np.float64(updates["head"]["kernel"])
    for k, stage in enumerate(reversed(names)):
        np.testing.assert_allclose(np.float64(updates[stage]["kernel"]), rate**k * head, rtol=4e-7)


@settings(max_examples=60, deadline=None)
@given(made=planned(), again=st.data())
def test_split_and_merge_are_inverse_on_every_tree_of_that_structure(made, again):
    """On gradients, labels and names as on the parameters; and each optimizer label has exactly its leaves."""
    plan, params, stats = made
    for tree in (params, plan.tree(lambda leaf: leaf.label), plan.tree(lambda leaf: leaf.size)):
        trainable, frozen = plan.split(tree)
        merged = plan.merge(trainable, frozen)
        assert jax.tree.structure(merged) == jax.tree.structure(tree)
        assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree)))
        names = [*plans.paths(trainable), *plans.paths(frozen)]
        assert sorted(names) == sorted(leaf.path for leaf in plan.leaves)
    moving, still = plan.split_stats(stats)
    assert jax.tree.structure(plan.merge(moving, still)) == jax.tree.structure(stats)
    labels = dict(zip(plans.paths(params), jax.tree.leaves(plan.tree(lambda leaf: leaf.label))))
    by_multiplier = {leaf.path: leaf.multiplier for leaf in plan.leaves}
    a, b = (again.draw(st.sampled_from(sorted(labels))) for _ in range(2))
    assert (labels[a] == labels[b]) is (by_multiplier[a] == by_multiplier[b])
