"""Freezing in time: which plan when, and what happens to the optimizer where the plan changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tljax import config as configs
from tljax import optim, phases
from tljax import plan as plans
from tljax.errors import UserError
from tljax.step import init_state

STAGES = ("stem", "block1", "block2", "head")
RNG = np.random.default_rng(0)
PARAMS = {s: {"kernel": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)} for s in STAGES}
GRADS = [{s: {"kernel": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)} for s in STAGES} for _ in range(12)]


def resolved(text: str, total: int = 12, per_epoch: float = 2.0) -> tuple[phases.Phase, ...]:
    pairs = phases.parse(text)(STAGES)
    return phases.resolve(
        [(length, plans.build(s(STAGES), PARAMS, stages=STAGES)) for length, s in pairs], total, per_epoch
    )


def trains(text: str, **more) -> list[tuple[int, int, str]]:
    return [(p.start, p.stop, " ".join(p.plan.live_stages)) for p in resolved(text, **more)]


def test_schedules():
    assert trains("phases(('4 steps', frozen()), ('rest', partial(last=1)))") == [
        (0, 4, "head"),
        (4, 12, "block2 head"),
    ]
    assert trains("lp_ft(head='2 epochs')") == [(0, 4, "head"), (4, 12, "stem block1 block2 head")]
    assert trains("lp_ft(head='2 epochs', then=partial(last=1))")[1][2] == "block2 head"
    assert trains("gradual_unfreezing(every='1 epochs')") == [
        (0, 2, "head"), (2, 4, "block2 head"), (4, 6, "block1 block2 head"), (6, 12, "stem block1 block2 head")
    ]  # fmt: skip
    assert trains("chain_thaw(each='2 steps')") == [
        (0, 2, "head"), (2, 4, "stem"), (4, 6, "block1"), (6, 8, "block2"), (8, 12, "stem block1 block2 head")
    ]  # fmt: skip
    assert trains("freeze_progressively(every='2 steps', groups=2)") == [
        (0, 2, "stem block1 block2 head"), (2, 4, "block1 block2 head"), (4, 12, "head")
    ]  # fmt: skip


def test_the_phase_is_a_function_of_the_step():
    found = resolved("gradual_unfreezing(every='1 epochs')")
    assert [phases.index(found, step) for step in range(13)] == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phases(('4 steps', frozen()), ('4 steps', full()))", "phase 2 of 2 .* from step 4 to 8, the run .* has 12"),
        ("phases(('20 steps', frozen()), ('rest', full()))", "phase 1 of 2 .* from step 0 to 20"),
        ("phases(('rest', frozen()), ('rest', full()))", "phase 1 of 2"),
        ("phases(('0 steps', frozen()), ('rest', full()))", "phase 1 of 2"),
        ("phases(('fortnight', frozen()), ('rest', full()))", "expected 'n steps' or 'n epochs'"),
        ("phases((4, frozen()))", "expected .duration, strategy"),
        ("gradual_unfreezng()", "unknown phases 'gradual_unfreezng'; nearest: gradual_unfreezing"),
        ("partial(last=1)", "a strategy; expected one of phases, lp_ft"),
        ("lp_ft(body=3)", "unexpected keyword argument 'body'"),
        ("freeze_progressively(groups=0)", "expected at least 1"),
    ],
)
def test_bad_phases_get_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        resolved(text)
    assert "\n" not in str(error.value)


def adam_by_hand(grads: list[np.ndarray], b1=0.9, b2=0.999, eps=1e-8) -> list[np.ndarray]:
    """The directions of a fresh Adam (Kingma & Ba 2015, algorithm 1), in float64."""
    m = v = 0.0
    found = []
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        found.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return found


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_goes_on_is_kept_and_what_is_thawed_is_a_fresh_adam(ema):
    """chain_thaw freezes and thaws again: the head trains in steps 1–2 and, afresh, from step 9 on."""
    config = configs.base().optim
    config.update({"name": "adamw", "weight_decay": 0.0, "clip": 0.0})
    found = resolved("phases(('3 steps', rules(('head', 1), ('**', 0))), ('3 steps', partial(last=2)), "
                     "('2 steps', rules(('block1', 0.5), ('**', 0))), ('rest', full()))")  # fmt: skip
    lr, state, moved = 0.1, None, {s: [] for s in STAGES}
    for phase in found:
        tx = optim.optimizer(phase.plan, config, lambda t: lr, phase.births)
        if state is None:
            state = init_state(phase.plan, tx, PARAMS, {}, ema)
        else:
            before = dict(zip(plans.paths(state.optimizer), jax.tree.leaves(state.optimizer)))
            state = phases.change(state, phase.plan, tx)
            after = dict(zip(plans.paths(state.optimizer), jax.tree.leaves(state.optimizer)))
            both = before.keys() & after.keys()
            assert all(np.asarray(before[p]).tobytes() == np.asarray(after[p]).tobytes() for p in both)
            assert all(not np.asarray(after[p]).any() for p in after.keys() - both)
        for step in range(phase.start, phase.stop):
            trainable, frozen = phase.plan.split(state.params)
            grads = phase.plan.split(GRADS[step])[0]
            updates, optimizer = tx.update(grads, state.optimizer, trainable)
            for stage in STAGES:
                delta = updates[stage]["kernel"]
                moved[stage].append(None if delta is None else np.asarray(delta))
            state = state._replace(
                params=phase.plan.merge(optax.apply_updates(trainable, updates), frozen), optimizer=optimizer
            )
    runs = {
        "stem": [(8, 12, 1)],
        "block1": [(3, 12, None)],
        "block2": [(3, 6, 1), (8, 12, 1)],
        "head": [(0, 6, 1), (8, 12, 1)],
    }
    for stage, spans in runs.items():
        assert [s for s in range(12) if moved[stage][s] is not None] == [s for a, b, _ in spans for s in range(a, b)]
        for a, b, _ in spans:
            directions = adam_by_hand([np.float64(GRADS[s][stage]["kernel"]) for s in range(a, b)])
            for s, direction in zip(range(a, b), directions):
                multiplier = 0.5 if stage == "block1" and 6 <= s < 8 else 1.0
                np.testing.assert_allclose(moved[stage][s], -lr * multiplier * direction, rtol=2e-5, atol=1e-7)
