"""config.dtype = "bfloat16": which numbers of a step are short, and which are not."""

import jax
import numpy as np
import pytest
from tiny import get_config

from tljax import experiment
from tljax.evaluate import differing
from tljax.parallel import Layout
from tljax.step import init_state

BATCH = 8


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("model", ["resnet_tiny", "vit_mini", "efficientnet_tiny"])
def test_a_step_computes_in_bfloat16_and_keeps_everything_in_float32(model):
    config = get_config()
    config.update({"model": model, "dtype": "bfloat16", "strategy": "full()", "ema": 0.9, "batch_size": BATCH})
    exp = experiment.build(config, 3)
    phase, layout = exp.in_time(24)[0], Layout(config.parallel, BATCH, devices=1)
    tx, _ = exp.optimizer(phase, 24)
    state = exp.state_shapes(phase.plan, tx)
    batch = layout.abstract_batch(BATCH, exp.preprocessing.size)
    step = exp.train_step(phase.plan, tx, layout)
    traced = jax.make_jaxpr(step)(state, batch)

    # The products, forward and backward; all of a step's work. Sums over a batch and the head's logits may be longer.
    products = [e for e in equations(traced.jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")]
    flops = {"bfloat16": 0, "float32": 0}
    for eqn in products:
        names = {v.aval.dtype.name for v in eqn.invars}
        flops["bfloat16" if names == {"bfloat16"} else "float32"] += max(np.prod(v.aval.shape) for v in eqn.invars)
    assert len(products) > 20
    assert flops["bfloat16"] > 0.9 * sum(flops.values()), flops

    found, metrics = jax.eval_shape(step, state, batch)
    floats = lambda tree: {x.dtype.name for x in jax.tree.leaves(tree) if x.dtype.kind not in "iu"}
    assert floats(found) == floats(state) == {"float32"}  # parameters, statistics, moments, moving averages
    assert {m.dtype.name for m in metrics.values()} == {"float32"}


def test_losses_in_bfloat16_are_those_of_float32_but_for_rounding():
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 3, BATCH).astype(np.int32),
    }

    def losses(dtype):
        config = get_config()
        config.update({"model": "vit_mini", "dtype": dtype, "strategy": "full()", "batch_size": BATCH})
        config.optim.lr = 1e-3
        exp = experiment.build(config, 3)
        phase, layout = exp.in_time(24)[0], Layout(config.parallel, BATCH, devices=1)
        tx, _ = exp.optimizer(phase, 24)
        params, stats, _ = exp.load()
        state, found = jax.jit(init_state, static_argnums=(0, 1, 4))(phase.plan, tx, params, stats, 0.0), []
        step = jax.jit(exp.train_step(phase.plan, tx, layout))
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
        return found

    short, long = losses("bfloat16"), losses("float32")
    assert short != long
    np.testing.assert_allclose(short, long, rtol=0.02)


@pytest.mark.parametrize(
    ("dtype", "nll", "right", "said"),
    [
        ("float32", 1.00005, 60, []),
        ("float32", 1.0002, 60, ["test/nll is 1.0002, was 1"]),
        ("float32", 1.0, 59, ["test/accuracy is 0.59, was 0.6"]),
        ("bfloat16", 1.01, 59, []),
        ("bfloat16", 1.05, 55, ["test/nll is 1.05, was 1", "test/accuracy is 0.55, was 0.6"]),
    ],
)
def test_figures_are_the_same_up_to_the_rounding_of_the_dtype(dtype, nll, right, said):
    """Of 100 photographs; other devices sum in another order."""
    figures = lambda nll, right: {"test": {"nll": nll, "accuracy": right / 100, "confusion": [[right, 100 - right]]}}
    assert differing(figures(nll, right), figures(1.0, 60), dtype) == said
