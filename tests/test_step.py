"""One step, by every way of running it: jit and pmap, 1 and 8 devices, FSDP; and what it must not touch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tljax import config as configs
from tljax import models, optim, strategies
from tljax import plan as plans
from tljax.parallel import Layout, cost
from tljax.step import evaluated, init_state, make_train_step, normalise

SIZE, BATCH, CLASSES = 32, 16, 5
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
RNG = np.random.default_rng(0)
BATCHES = [
    {
        "image": RNG.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8),
        "label": RNG.integers(0, CLASSES, BATCH, dtype=np.int32),
    }
    for _ in range(3)
]


@functools.cache
def setting(model="resnet_tiny", strategy="full()", **options):
    """A `Setting`, compiled once for all tests that want the same."""
    return Setting(model, strategy, **options)


class Setting:
    """A tiny model, a plan, an optimizer and the compiled step on a layout."""

    def __init__(self, model="resnet_tiny", strategy="full()", mode="jit", fsdp=1, devices=8, optimizer=(), **options):
        self.config = configs.base()
        self.config.optim.update(
            {"warmup": "0 steps", "lr": 0.05, "name": "sgd", "weight_decay": 0.01} | dict(optimizer)
        )
        self.layout = Layout(ConfigDict({"mode": mode, "fsdp": fsdp}), BATCH, options.get("accumulate", 1), devices)
        self.model = models.create(model, CLASSES, axis_name=self.layout.axis_name, drop_rate=0.3, drop_path_rate=0.2)
        variables = models.initialise(self.model, jax.random.key(1), SIZE)
        # Statistics as a loaded network has them: arithmetic on 0 and 1 would be exact, whatever it does.
        self.params, self.stats = (
            variables["params"],
            jax.tree.map(
                lambda x: x + jnp.asarray(np.random.default_rng(0).normal(0, 0.1, x.shape), x.dtype),
                variables.get("batch_stats", {}),
            ),
        )
        self.plan = plans.build(
            strategies.parse(strategy)(self.model.stages), self.params, self.stats, self.model.stages
        )
        self.tx = optim.optimizer(self.plan, self.config.optim, optim.learning_rate(self.config.optim, 10, 5.0))
        step = make_train_step(
            self.model, self.plan, self.tx, mean=MEAN, std=STD, num_classes=CLASSES, smoothing=0.1,
            axis_name=self.layout.axis_name, **options,
        )  # fmt: skip
        self.start = init_state(self.plan, self.tx, self.params, self.stats, options.get("ema", 0.0))
        self.compiled = self.layout.compile_train(step, self.start, self.layout.abstract_batch(BATCH, SIZE))

    def run(self):
        """Returns (final state as numpy, losses, accuracies)."""
        state, measured = self.layout.place(self.start), []
        for batch in BATCHES:
            state, metrics = self.compiled(state, self.layout.place_batch(batch))
            measured.append(jax.device_get(metrics))
        return (
            self.layout.to_host(state),
            [float(m["loss"]) for m in measured],
            [float(m["accuracy"]) for m in measured],
        )


def assert_same(a, b, rtol=2e-4, atol=2e-5):
    (state_a, loss_a, acc_a), (state_b, loss_b, acc_b) = a, b
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-4)
    assert acc_a == pytest.approx(acc_b)
    for path, x, y in zip(plans.paths(state_a), jax.tree.leaves(state_a), jax.tree.leaves(state_b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=path)


OPTIONS = {"mixup": 0.3, "cutmix": 1.0, "ema": 0.9}


@pytest.mark.parametrize("model", ["resnet_tiny", "groupnorm_tiny"])
def test_one_and_eight_devices_jit_and_pmap_are_one_program(model):
    """With dropout, stochastic depth, mixup, CutMix and the moving average; BatchNorm over the global batch."""
    reference = setting(model, devices=1, **OPTIONS).run()
    assert_same(reference, setting(model, devices=8, **OPTIONS).run())
    assert_same(reference, setting(model, mode="pmap", devices=8, **OPTIONS).run())


def test_fsdp_gives_the_same_results_and_lays_large_leaves_over_devices(monkeypatch):
    monkeypatch.setattr("tljax.parallel.FSDP_LEAST", 64)
    sharded = Setting(fsdp=2)
    state = sharded.layout.place(sharded.start)
    kernel = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    assert_same(setting(devices=1).run(), sharded.run())


def test_accumulation_equals_one_large_batch_where_nothing_is_random():
    only_stem = "rules(('stem', 1), ('**', 0))"  # dropout and stochastic depth are off in frozen stages
    whole = setting("groupnorm_tiny", only_stem, devices=1).run()
    assert_same(whole, setting("groupnorm_tiny", only_stem, devices=1, accumulate=2).run())


def test_accumulation_is_one_program_under_jit_and_pmap():
    """With dropout and with BatchNorm, whose statistics move once a part."""
    assert_same(setting(devices=4, accumulate=2).run(), setting(mode="pmap", devices=4, accumulate=2).run())


@pytest.mark.parametrize(
    "strategy", ["frozen()", "partial(last=1)", "surgical('block1')", "rules(('**/bias', 1), ('**', 0))"]
)
def test_frozen_values_stay_bit_identical_and_the_others_move(strategy):
    """AdamW with decay, clip, moving average, accumulation and a schedule; parameters and statistics."""
    tiny = setting(strategy=strategy, devices=1, ema=0.9, accumulate=2, mixup=0.2,
                      optimizer=(("name", "adamw"), ("weight_decay", 0.5), ("schedule", "cosine")))  # fmt: skip
    before = tiny.plan.frozen_digests(tiny.params, tiny.stats)
    state, _, _ = tiny.run()
    assert tiny.plan.frozen_digests(state.params, state.stats) == before
    assert before
    for leaf, old, new in zip(tiny.plan.leaves, jax.tree.leaves(tiny.params), jax.tree.leaves(state.params)):
        assert np.array_equal(old, new) == (leaf.multiplier == 0), leaf.path
    for (path, _), old, new in zip(tiny.plan.stats, jax.tree.leaves(tiny.stats), jax.tree.leaves(state.stats)):
        assert np.array_equal(old, new) == (path.rpartition("/")[0] not in tiny.plan.live_norms), path
    params, stats = evaluated(state, tiny.plan)
    assert tiny.plan.frozen_digests(params, stats) == before


def test_layerwise_multipliers_scale_the_first_update_exactly():
    plainly = (("weight_decay", 0.0), ("clip", 0.0))
    decayed, full = (setting(strategy=s, devices=1, optimizer=plainly) for s in ("layerwise_decay(0.5)", "full()"))
    batch = BATCHES[0]
    after, reference = (
        s.layout.to_host(s.compiled(s.layout.place(s.start), s.layout.place_batch(batch))[0]).params
        for s in (decayed, full)
    )
    for leaf, start, a, b in zip(
        decayed.plan.leaves, jax.tree.leaves(decayed.params), jax.tree.leaves(after), jax.tree.leaves(reference)
    ):
        depth = len(decayed.plan.stages) - 1 - decayed.plan.stages.index(leaf.stage)
        np.testing.assert_allclose(a - start, 0.5**depth * (b - start), rtol=1e-3, atol=1e-7, err_msg=leaf.path)


def test_the_moving_average_by_hand():
    tiny = setting(strategy="frozen()", devices=1, ema=0.9)
    state = tiny.layout.place(tiny.start)
    average = np.asarray(tiny.params["head"]["kernel"], np.float64)
    for t, batch in enumerate(BATCHES):
        state, _ = tiny.compiled(state, tiny.layout.place_batch(batch))
        rate = min(0.9, (1 + t) / (10 + t))
        average = rate * average + (1 - rate) * np.asarray(state.params["head"]["kernel"], np.float64)
    np.testing.assert_allclose(state.average["params"]["head"]["kernel"], average, rtol=1e-5)
    assert set(plans.paths(state.average["params"])) == {"head/bias", "head/kernel"}  # nothing for frozen leaves


def test_the_loss_by_hand():
    tiny = setting(strategy="rules(('stem', 1), ('**', 0))", devices=1)
    batch = BATCHES[0]
    x = (batch["image"] / 255.0 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(normalise(jnp.asarray(batch["image"]), MEAN, STD), x, rtol=1e-5, atol=1e-5)
    variables = {"params": tiny.params, "batch_stats": tiny.stats}
    logits, _ = tiny.model.apply(variables, jnp.asarray(x, jnp.float32), live=tiny.plan.live, mutable=["batch_stats"])
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.full((BATCH, CLASSES), 0.1 / CLASSES)
    target[np.arange(BATCH), batch["label"]] += 0.9
    _, losses, accuracies = tiny.run()
    assert losses[0] == pytest.approx(-(target * log_p).sum(-1).mean(), rel=1e-4)
    assert accuracies[0] == pytest.approx((logits.argmax(-1) == batch["label"]).mean())


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_the_state_is_donated(mode):
    tiny = setting("groupnorm_tiny", "frozen()", mode=mode)
    state = tiny.layout.place(tiny.start)
    tiny.compiled(state, tiny.layout.place_batch(BATCHES[0]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def reduced_bytes(compiled) -> int:
    """Bytes that the all-reduces (and reduce-scatters) of a compiled program move, read from its HLO."""
    size = {"f32": 4, "f64": 8, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
    total = 0
    for line in compiled.as_text().splitlines():
        match = re.search(r"= (.*?) (all-reduce|all-reduce-start|reduce-scatter)\(", line)
        if match:
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                total += size[kind] * int(np.prod([int(d) for d in dims.split(",") if d]))
    return total


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("strategy", ["frozen()", "partial(last=1)", "full()"])
def test_the_all_reduce_moves_the_trainable_bytes_and_no_more(mode, strategy):
    tiny = setting("groupnorm_tiny", strategy, mode=mode)
    trainable = sum(leaf.nbytes for leaf in tiny.plan.trainable)
    moved = reduced_bytes(tiny.compiled)
    # Beside the gradients only the scalars loss and accuracy.
    assert trainable <= moved <= trainable + 16


def test_freezing_saves_the_backward_pass():
    flops = {
        s: cost(setting(strategy=s, devices=1).compiled)["flops_per_step"]
        for s in ("frozen()", "partial(last=1)", "full()")
    }
    assert flops["frozen()"] < 0.45 * flops["full()"]
    assert flops["frozen()"] < flops["partial(last=1)"] < flops["full()"]
