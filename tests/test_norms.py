"""What stores no statistics has none to move, and a frozen prefix is a pure function of its input, for every norm."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tljax import models, strategies
from tljax import plan as plans
from tljax.models import layers
from tljax.models.chain import Chain

CLASSES = 3
STATELESS = ("group", "layer", "rms")
STRATEGIES = ["frozen()", "partial(last=1)", "norms_only()", "biases_only()", "full()"]


class Block(nn.Module):
    """A norm, a convolution, dropout and stochastic depth."""

    common: layers.Common
    rate: float

    @nn.compact
    def __call__(self, x, live):
        branch = layers.Conv(self.common, 8, 3, use_bias=True, name="conv")(layers.norm(self.common, "norm")(x, live))
        if "/".join(self.path) in live:
            branch = layers.drop(self, branch, self.rate, self.common.axis_name)
            branch = layers.drop(self, branch, self.rate, self.common.axis_name, whole=True)
        return x + branch


class Normed(Chain):
    """Three blocks with norms of one kind."""

    kind: str = "layer"

    @property
    def stages(self):
        return ("stem", "block1", "block2", "block3", "head")

    def stage(self, name):
        common = layers.Common(self.dtype, self.param_dtype, self.axis_name, norm=self.kind)
        if name == "stem":
            return Stem(common, name=name)
        if name == "head":
            return layers.Head(common, self.num_classes, self.drop_rate, name=name)
        return Block(common, self.drop_path_rate, name=name)


class Stem(nn.Module):
    """8 channels of 3."""

    common: layers.Common

    @nn.compact
    def __call__(self, x, live):
        return layers.Conv(self.common, 8, name="conv")(x)


def dropping(kind):
    """The model that drops a lot, its variables, and images [6, 32, 32, 3]."""
    if kind == "vit":
        model = models.create("vit_mini", CLASSES, drop_rate=0.5, drop_path_rate=0.6)
    else:
        model = Normed(num_classes=CLASSES, size=32, kind=kind, drop_rate=0.5, drop_path_rate=0.4)
    x = jax.random.normal(jax.random.key(2), (6, 32, 32, 3))
    return model, models.initialise(model, jax.random.key(0)), x


def plan_of(model, strategy) -> plans.Plan:
    shapes = models.shapes(model)
    return plans.build(strategies.parse(strategy)(model.stages), shapes["params"], shapes["batch_stats"], model.stages)


@pytest.mark.parametrize(
    ("kind", "strategy"), [("vit", "attention_only()"), *itertools.product((*STATELESS, "vit"), STRATEGIES)]
)
def test_without_statistics_none_are_live_frozen_or_shown(kind, strategy):
    model, variables, _ = dropping(kind)
    assert variables["batch_stats"] == {}
    plan = plan_of(model, strategy)
    assert plan.stats == ()
    assert plan.live == frozenset(plan.live_stages)
    assert all(path.startswith("params/") for path in plan.frozen)
    assert {row["norm"] for row in plan.rows()} == {"-"}


def test_batch_norm_in_the_same_network_has_statistics_that_follow_its_parameters():
    model, _, _ = dropping("batch")
    assert plan_of(model, "partial(last=1)").live_norms == {"block3/norm"}
    assert plan_of(model, "biases_only()").live_norms == {f"block{i}/norm" for i in (1, 2, 3)}


@pytest.mark.parametrize("kind", [*STATELESS, "batch", "vit"])
def test_a_frozen_prefix_is_a_pure_function_of_its_input(kind):
    """Whatever the random key, the step and the batch: bit-identical, and what evaluation sees."""
    model, variables, x = dropping(kind)
    middle = "block3"
    plan = plan_of(model, f"partial(from_stage={middle!r})")
    assert plan.prefix == model.stages[: model.stages.index(middle)]

    @jax.jit
    def trained(x, key):
        run = lambda stop: model.apply(
            variables, x, live=plan.live, stop=stop, rngs={"dropout": key}, mutable=["batch_stats"]
        )[0]  # fmt: skip
        return run(middle), run(None)

    (before, logits), (again, others) = (trained(x, jax.random.key(seed)) for seed in (3, 4))
    np.testing.assert_array_equal(before, again)
    assert np.abs(logits - others).max() > 1e-3  # behind it something drops
    # The step of a plan and evaluation are two programs: equal but for rounding. So are batches.
    evaluated = jax.jit(lambda x: model.apply(variables, x, stop=middle))(x)
    np.testing.assert_allclose(before, evaluated, rtol=0, atol=1e-5)
    alone = jnp.concatenate([trained(x[i : i + 1], jax.random.key(5))[0] for i in range(3)])
    np.testing.assert_allclose(alone, evaluated[:3], rtol=0, atol=1e-5)


def test_live_stages_of_a_transformer_drop():
    model, variables, x = dropping("vit")
    plain = model.apply(variables, x)
    run = jax.jit(
        lambda key, live: model.apply(variables, x, live=live, rngs={"dropout": key}), static_argnames="live"
    )  # fmt: skip
    for stage in ("embed", "block1", "block2", "block6", "norm", "head"):
        got = run(jax.random.key(6), frozenset({stage}))
        # The first block's rate is 0, by the linear rule; embed and norm have nothing to drop.
        drops = stage == "head" or (stage.startswith("block") and stage != "block1")
        assert (np.abs(got - plain).max() > 1e-3) == drops, stage
