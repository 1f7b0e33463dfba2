"""What each strategy trains, and what it says of bad arguments."""

import jax.numpy as jnp
import pytest

from tljax import plan as plans
from tljax import strategies
from tljax.errors import UserError

STAGES = ("stem", "block1", "block2", "block3", "top", "head")
PARAMS = {stage: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for stage in STAGES}


def multipliers(text: str) -> dict[str, float]:
    """The multiplier of each stage's kernel."""
    plan = plans.build(strategies.parse(text)(STAGES), PARAMS, stages=STAGES)
    found = {leaf.stage: leaf.multiplier for leaf in plan.leaves if leaf.path.endswith("kernel")}
    return {stage: found[stage] for stage in STAGES}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("frozen()", [0, 0, 0, 0, 0, 1]),
        ("frozen", [0, 0, 0, 0, 0, 1]),
        ("partial(last=1)", [0, 0, 0, 0, 1, 1]),
        ("partial(2)", [0, 0, 0, 1, 1, 1]),
        ("partial(last=5)", [1, 1, 1, 1, 1, 1]),
        ("partial(from_stage='block2')", [0, 0, 1, 1, 1, 1]),
        ("partial(from_stage='head')", [0, 0, 0, 0, 0, 1]),
        ("partial(last=2, body=0.1)", [0, 0, 0, 0.1, 0.1, 1]),
        ("full()", [1, 1, 1, 1, 1, 1]),
        ("full(body=0.1)", [0.1, 0.1, 0.1, 0.1, 0.1, 1]),
        ("first(rules(('**/bias', 0)), partial(last=2))", [0, 0, 0, 1, 1, 1]),
        ("layerwise_decay(0.5)", [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
        ("layerwise_decay(1)", [1, 1, 1, 1, 1, 1]),
        ("surgical('block1')", [0, 1, 0, 0, 0, 1]),
        ("surgical('head')", [0, 0, 0, 0, 0, 1]),
        ("discriminative({'block*': 0.1, 'stem': 0.01, 'top': 0.5, 'head': 1})", [0.01, 0.1, 0.1, 0.1, 0.5, 1]),
        ("rules(('head', 1), ('re:block[12]/.*', 0.3), ('**', 0))", [0, 0.3, 0.3, 0, 0, 1]),
    ],
)
def test_multipliers_by_stage(text, expected):
    assert list(multipliers(text).values()) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partail(last=2)", "unknown strategy 'partail'; nearest: partial"),
        ("partial()", "give either last=n or from_stage"),
        ("partial(last=2, from_stage='top')", "give either last=n or from_stage"),
        ("partial(last=9)", "the model has 5 stages before its head"),
        ("partial(from_stage='blok2')", "unknown stage 'blok2'; nearest: block2"),
        ("partial(depth=2)", "unexpected keyword argument 'depth'"),
        ("partial(last=1, body=0)", "expected a multiplier above 0"),
        ("surgical('block9')", "unknown stage 'block9'"),
        ("layerwise_decay(1.5)", "expected 0 < rate <= 1"),
        ("layerwise_decay('a')", "layerwise_decay"),
        ("discriminative({'head': 1})", "no rule matches block1/bias"),
        ("discriminative(3)", "expected {pattern: multiplier"),
        ("rules(('**', -1))", "expected (pattern, multiplier >= 0)"),
        ("rules(('**', 0))", "everything is frozen"),
        ("partial(last=", "cannot be read"),
        ("__import__('os').system('true')", "neither a call nor a value"),
        ("(lambda: 1)()", "neither a call nor a value"),
        ("partial(last=1 + x)", "neither a call nor a value"),
        ("3", "cannot be read"),
    ],
)
def test_bad_strategies_get_one_line(text, message):
    with pytest.raises(UserError) as error:
        multipliers(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
