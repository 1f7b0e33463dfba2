"""`config.norm_stats`: whose normalisation statistics move, by hand, in the plan and through the real step."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tljax import config as configs
from tljax import models, optim, strategies
from tljax import plan as plans
from tljax.cost import theory
from tljax.errors import UserError
from tljax.parallel import Layout
from tljax.phases import Phase, never_trained
from tljax.step import evaluated, init_state, make_train_step

SIZE, BATCH, CLASSES = 32, 8, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
LABELS = RNG.integers(0, CLASSES, BATCH, dtype=np.int32)
BIASES = "first(rules(('stem/bn1/bias', 1)), frozen())"


def planned(model: str, strategy: str, norm_stats: str) -> plans.Plan:
    model = models.create(model, CLASSES)
    shapes = models.shapes(model, SIZE)
    rules = strategies.parse(strategy)(model.stages)
    stats = shapes.get("batch_stats", {})
    return plans.build(rules, shapes["params"], stats, model.stages, norm_stats=norm_stats)


def test_which_norms_move():
    moving = {mode: planned("resnet_tiny", BIASES, mode).live_norms for mode in plans.NORM_STATS}
    every = {f"block{b}/{n}" for b in (1, 2, 3) for n in ("bn1", "bn2", "bn3", "downsample_bn")} | {"stem/bn1"}
    assert moving == {"plan": {"stem/bn1"}, "frozen": set(), "batch": every}
    for mode, norms in moving.items():
        plan = planned("resnet_tiny", BIASES, mode)
        assert plan.live == norms | {"stem", "head"}  # dropout follows what trains, whatever the norms do
        still = {p for p in plan.frozen if p.startswith("batch_stats/")}
        assert still == {f"batch_stats/{n}/{v}" for n in every - norms for v in ("mean", "var")}


def test_the_frozen_prefix_stops_before_statistics_that_move():
    probe = {mode: planned("resnet_tiny", "frozen()", mode) for mode in plans.NORM_STATS}
    assert probe["plan"].prefix == probe["frozen"].prefix == ("stem", "block1", "block2", "block3")
    assert probe["batch"].prefix == ()
    # What the backward pass costs is another question: no gradient runs through stages before the first live one.
    forward = dict.fromkeys(probe["plan"].stages, 1.0)
    assert theory(probe["batch"], forward) == theory(probe["plan"], forward)
    assert [row["norm"] for row in probe["batch"].rows()] == ["moving"] * 4 + ["-"]
    assert [row["trainable"] for row in probe["batch"].rows()][:4] == [0] * 4


def test_the_digest_tells_plans_apart_by_what_they_do():
    digest = lambda model, strategy, mode: planned(model, strategy, mode).digest
    assert len({digest("resnet_tiny", BIASES, mode) for mode in plans.NORM_STATS}) == 3
    assert digest("resnet_tiny", "frozen()", "plan") == digest("resnet_tiny", "frozen()", "frozen")
    assert digest("resnet_tiny", "full()", "plan") == digest("resnet_tiny", "full()", "batch")
    assert len({digest("groupnorm_tiny", "full()", mode) for mode in plans.NORM_STATS}) == 1


def test_statistics_that_move_are_never_certified():
    plan = planned("resnet_tiny", "frozen()", "batch")
    assert never_trained((Phase(plan, 0, 1, {}),)) == {
        f"params/{leaf.path}": leaf.size for leaf in plan.leaves if leaf.stage != "head"
    }


def test_unknown_modes_get_one_line():
    with pytest.raises(UserError, match="unknown norm_stats 'btach'; nearest: batch"):
        plans.build([("**", 1)], {"a": IMAGES}, norm_stats="btach")
    config = configs.base()
    config.norm_stats = "btach"
    with pytest.raises(UserError, match=r"config.norm_stats = 'btach': expected one of plan, frozen, batch"):
        configs.check(config)


@functools.cache
def stepped(model_name: str, norm_stats: str, ema: float = 0.0):
    """A real step (or some) of SGD on the bias of the stem's norm and the head: (plan, before, after, last loss)."""
    model = models.create(model_name, CLASSES)
    variables = models.initialise(model, jax.random.key(1), SIZE)
    params, stats = variables["params"], variables.get("batch_stats", {})
    rng = np.random.default_rng(1)
    stats = jax.tree.map(lambda s: s + rng.uniform(-0.1, 0.1, s.shape).astype(np.float32), stats)
    rules = strategies.parse(BIASES)(model.stages)
    plan = plans.build(rules, params, stats, model.stages, norm_stats=norm_stats)
    config = configs.base().optim
    config.update({"name": "sgd", "weight_decay": 0.0})
    tx = optim.optimizer(plan, config, lambda t: 0.1)
    layout = Layout(ConfigDict({"mode": "jit", "fsdp": 1}), BATCH, devices=1)
    step = make_train_step(model, plan, tx, mean=(0, 0, 0), std=(1, 1, 1), num_classes=CLASSES, ema=ema)
    state = init_state(plan, tx, params, stats, ema)
    before = jax.tree.map(np.array, state)
    compiled = layout.compile_train(step, state, layout.abstract_batch(BATCH, SIZE))
    after = layout.place(state)
    for _ in range(20 if ema else 1):
        after, metrics = compiled(after, layout.place_batch({"image": IMAGES, "label": LABELS}))
    return plan, before, layout.to_host(after), float(metrics["loss"])


def test_the_step_moves_what_the_plan_says_by_hand():
    found = {mode: stepped("resnet_tiny", mode) for mode in plans.NORM_STATS}
    for mode, (plan, before, after, _) in found.items():
        assert not np.array_equal(before.params["stem"]["bn1"]["bias"], after.params["stem"]["bn1"]["bias"])
        for (path, _), old, new in zip(plan.stats, jax.tree.leaves(before.stats), jax.tree.leaves(after.stats)):
            moves = {"plan": path.startswith("stem/"), "frozen": False, "batch": True}[mode]
            assert np.array_equal(old, new) is not moves, (mode, path)
        assert plan.frozen_digests(before.params, before.stats) == plan.frozen_digests(after.params, after.stats)
    # The stem's statistics: 0.9 of the old and 0.1 of the batch's, from the 7x7 convolution of the pixels.
    _, before, after, _ = found["batch"]
    x = np.pad(IMAGES / 255.0, ((0, 0), (3, 3), (3, 3), (0, 0)))
    kernel = np.float64(before.params["stem"]["conv1"]["kernel"])
    window = np.lib.stride_tricks.sliding_window_view(x, (7, 7), (1, 2))[:, ::2, ::2]
    y = np.einsum("bhwckl,klco->bhwo", window, kernel).reshape(-1, kernel.shape[-1])
    old, new = before.stats["stem"]["bn1"], after.stats["stem"]["bn1"]
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * y.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * y.var(0, ddof=1), rtol=1e-4, atol=1e-5)
    losses = [loss for *_, loss in found.values()]
    assert len(set(losses)) == 3  # what the norms normalise by is in the loss


def test_where_nothing_is_stored_the_modes_are_one():
    (_, _, a, loss_a), *others = (stepped("groupnorm_tiny", mode) for mode in plans.NORM_STATS)
    for _, _, b, loss_b in others:
        assert loss_a == loss_b
        assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_the_moving_average_leaves_stored_statistics_as_they_are():
    """A weighted mean of equal numbers is often not that number: after some steps no frozen bit may differ."""
    plan, before, after, _ = stepped("resnet_tiny", "plan", ema=0.9)
    assert plan.frozen_digests(*evaluated(after, plan)) == plan.frozen_digests(before.params, before.stats)
    moved = after.average["stats"]["stem"]["bn1"]["mean"]
    assert not np.array_equal(moved, before.stats["stem"]["bn1"]["mean"])
    assert not np.array_equal(moved, after.stats["stem"]["bn1"]["mean"])
