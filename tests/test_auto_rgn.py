"""Relative gradient norms by hand, and the command on the tiny experiment."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tljax import auto_rgn, strategies
from tljax.errors import UserError

RNG = np.random.default_rng(0)
PARAMS = {
    "body": {"kernel": RNG.normal(size=(3, 4)).astype(np.float32), "bias": np.ones(4, np.float32)},
    "head": {"kernel": RNG.normal(size=(4, 1)).astype(np.float32)},
}
BATCHES = [{"x": RNG.normal(size=(5, 3)), "y": RNG.normal(size=(5, 1))} for _ in range(3)]


def loss(params, batch):
    hidden = batch["x"] @ params["body"]["kernel"] + params["body"]["bias"]
    return jnp.square(hidden @ params["head"]["kernel"] - batch["y"]).mean()


def test_the_ratios_by_hand():
    """The gradients of two linear layers under a squared error, written out in numpy."""
    w, b, v = PARAMS["body"]["kernel"], PARAMS["body"]["bias"], PARAMS["head"]["kernel"]
    expected = {"body": [], "head": []}
    for batch in BATCHES:
        hidden = batch["x"] @ w + b
        error = 2 * (hidden @ v - batch["y"]) / 5
        body = [batch["x"].T @ error @ v.T, (error @ v.T).sum(0)]
        norm = lambda parts: np.sqrt(sum((np.asarray(part) ** 2).sum() for part in parts))
        expected["body"].append(norm(body) / norm([w, b]))
        expected["head"].append(norm([hidden.T @ error]) / norm([v]))
    found = auto_rgn.relative_gradient_norms(loss, PARAMS, BATCHES)
    assert list(found) == ["body", "head"]
    for stage, ratios in expected.items():
        assert found[stage] == pytest.approx(np.mean(ratios), rel=1e-4)


def test_multipliers_are_relative_to_the_largest_and_become_a_strategy():
    assert auto_rgn.multipliers({"a": 0.2, "b": 0.05, "head": 9.0}, head="head") == {"a": 1, "b": 0.25, "head": 1}
    found = auto_rgn.multipliers({"a": 0.0123456, "head": 0.1})
    assert found == {"a": 0.123, "head": 1}
    written = strategies.parse(auto_rgn.strategy(found))(("a", "head"))
    assert written == (("a", 0.123), ("head", 1.0))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: auto_rgn.relative_gradient_norms(loss, PARAMS, []), "no batch"),
        (
            lambda: auto_rgn.relative_gradient_norms(loss, PARAMS | {"head": {"kernel": np.zeros((4, 1))}}, BATCHES),
            "relative gradient norm of 'head' is inf",
        ),
        (lambda: auto_rgn.multipliers({"a": 0.0, "head": 1.0}, head="head"), "no stage but the head"),
        (lambda: auto_rgn.multipliers({"a": 1.0}, head="haed"), "unknown stage 'haed'"),
    ],
)
def test_what_cannot_be_measured(act, message):
    with pytest.raises(UserError, match=re.escape(message)):
        act()


def test_the_command_prints_a_strategy_of_all_stages(tiny, capsys):
    assert auto_rgn.main([*tiny, "--batches=2"]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    text = re.fullmatch(r'config\.strategy = "(.*)"', line)[1]
    rules = dict(strategies.parse(text)(()))
    assert list(rules) == ["stem", "block1", "block2", "block3", "head"]
    assert rules["head"] == 1
    assert max(m for stage, m in rules.items() if stage != "head") == 1
