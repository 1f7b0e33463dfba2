"""Every strategy and every schedule of phases, end to end through the real step on a small network with attention."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from tljax import config as configs
from tljax import models, optim, phases, strategies
from tljax import plan as plans
from tljax.models import layers
from tljax.models.chain import Chain
from tljax.step import evaluated, init_state, make_train_step

STEPS, SIZE, CLASSES, COMMON = 2, 16, 3, layers.Common()
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8), "label": RNG.integers(0, CLASSES, 4, np.int32)
}  # fmt: skip


class Block(nn.Module):
    """Convolution with a bias, BatchNorm, attention over the pixels."""

    attention: bool

    @nn.compact
    def __call__(self, x, live):
        x = layers.Conv(COMMON, 8, 3, 2, use_bias=True, name="conv")(x)
        x = jax.nn.relu(layers.BatchNorm(COMMON, name="bn")(x, live))
        if self.attention:
            flat = x.reshape(len(x), -1, 8)
            x = x + nn.MultiHeadDotProductAttention(2, name="attn")(flat, flat).reshape(x.shape)
        return x


class Small(Chain):
    @property
    def stages(self):
        return ("stem", "block1", "block2", "head")

    def stage(self, name):
        if name == "head":
            return layers.Head(COMMON, CLASSES, name=name)
        return Block(name == "block2", name=name)


MODEL = Small(num_classes=CLASSES, size=SIZE)
LAST = ("head/kernel", "head/bias")


@functools.cache
def start():
    variables = models.initialise(MODEL, jax.random.key(0), SIZE)
    return variables["params"], variables["batch_stats"]


def planned(strategy: strategies.Strategy) -> plans.Plan:
    return plans.build(strategy(MODEL.stages), *start(), MODEL.stages)


def optimizer(plan, births=None):
    config = configs.base().optim
    config.update({"lr": 0.01, "warmup": "0 steps"})
    return optim.optimizer(plan, config, lambda step: config.lr, births)


def trained(plan, tx, state, steps):
    """The state after so many steps, as numpy; the loss of each is finite."""
    step = jax.jit(make_train_step(MODEL, plan, tx, mean=(0.5,) * 3, std=(0.2,) * 3, num_classes=CLASSES, ema=0.5))
    for _ in range(steps):
        state, metrics = step(state, BATCH)
        assert np.isfinite(metrics["loss"])
        assert metrics["grad_norm"] > 0
    return jax.tree.map(np.asarray, state)


def moved(before, after) -> set[str]:
    pairs = zip(plans.paths(before), jax.tree.leaves(before), jax.tree.leaves(after))
    return {path for path, a, b in pairs if np.asarray(a).tobytes() != np.asarray(b).tobytes()}


def check(plan, before, after):
    """What is frozen is bit-identical, in the average too, what trains has moved, and so have the live statistics."""
    digests = plan.frozen_digests(before.params, before.stats)
    assert plan.frozen_digests(after.params, after.stats) == digests
    assert plan.frozen_digests(*evaluated(after, plan)) == digests
    # The bias of a key adds the same to all logits of a query: its gradient is 0 but for rounding.
    idle = {leaf.path for leaf in plan.leaves if leaf.path.endswith("key/bias")}
    assert moved(before.params, after.params) | idle == {leaf.path for leaf in plan.trainable} | idle
    assert {p.rpartition("/")[0] for p in moved(before.stats, after.stats)} == plan.live_norms


# What each trains, said in another way: a function of the path.
EXAMPLES = {
    "rules": ("rules(('!{stem,head}', 0), ('**', 0.5))", lambda p: p.startswith(("stem/", "head/"))),
    "frozen": ("frozen()", lambda p: p in LAST),
    "partial": ("partial(last=1, body=0.1)", lambda p: p.startswith("block2/") or p in LAST),
    "full": ("full(body=0.1)", lambda p: True),
    "layerwise_decay": ("layerwise_decay(0.5, {'**/bias': 0.5, 'stem': 0.2})", lambda p: True),
    "surgical": ("surgical('block1')", lambda p: p.startswith("block1/") or p in LAST),
    "discriminative": ("discriminative({'{stem,block1}': 0, 'block2': 0.1, 'head': 1})",
                       lambda p: p.startswith("block2/") or p in LAST),
    "head_and": ("head_and('stem/conv/kernel')", lambda p: p == "stem/conv/kernel" or p in LAST),
    "biases_only": ("biases_only()", lambda p: p.endswith("bias") or p in LAST),
    "norms_only": ("norms_only(body=0.3)", lambda p: "/bn/" in p or p in LAST),
    "frozen_norms": ("frozen_norms(partial(last=2))", lambda p: not p.startswith("stem/") and "/bn/" not in p),
    "attention_only": ("attention_only()", lambda p: "/attn/" in p or p in LAST),
    "first": ("first(rules(('**/bn', 0)), partial(last=2))", lambda p: not p.startswith("stem/") and "/bn/" not in p),
    "scaled": ("scaled(surgical('stem'), 0.5)", lambda p: p.startswith("stem/") or p in LAST),
    "within": ("first(within('block2/attn', rules(('{query,out}', 1), ('**', 0))), frozen())",
               lambda p: p.startswith(("block2/attn/query/", "block2/attn/out/")) or p in LAST),
}  # fmt: skip


def test_no_strategy_and_no_schedule_is_left_out():
    assert set(EXAMPLES) == set(strategies.STRATEGIES)
    assert {text.split("(")[0] for text in SCHEDULES} == set(phases.SCHEDULES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_strategy_trains_what_it_says(name):
    text, trains = EXAMPLES[name]
    plan = planned(strategies.parse(text))
    assert {leaf.path for leaf in plan.trainable} == {leaf.path for leaf in plan.leaves if trains(leaf.path)}
    tx = optimizer(plan)
    state = init_state(plan, tx, *start(), 0.5)
    before = jax.tree.map(np.array, state)
    check(plan, before, trained(plan, tx, state, STEPS))


SCHEDULES = [
    "phases(('1 steps', biases_only()), ('rest', partial(last=1)))",
    "lp_ft(head='1 steps', then=norms_only())",
    "gradual_unfreezing(every='1 steps')",
    "chain_thaw(each='1 steps')",
    "freeze_progressively(every='1 steps', groups=2)",
]


@pytest.mark.parametrize("text", SCHEDULES, ids=lambda text: text.split("(")[0])
def test_phases_train_what_each_says_in_turn(text):
    pairs = [(length, planned(strategy)) for length, strategy in phases.parse(text)(MODEL.stages)]
    found = phases.resolve(pairs, len(pairs), 1.0)
    first = state = None
    for phase in found:
        tx = optimizer(phase.plan, phase.births)
        if state is None:
            state = init_state(phase.plan, tx, *start(), 0.5)
            first = jax.tree.map(np.array, state)
        else:
            state = phases.change(state, phase.plan, tx)
        before = jax.tree.map(np.array, state)
        state = trained(phase.plan, tx, state, phase.stop - phase.start)
        check(phase.plan, before, state)
    assert int(state.step) == found[-1].stop
    never = phases.never_trained(found)
    began, ended = (
        {f"params/{p}": x for p, x in zip(plans.paths(s.params), jax.tree.leaves(s.params))} for s in (first, state)
    )
    assert all(began[path].tobytes() == ended[path].tobytes() for path in never if path in began)
