"""Laws of the plan over random trees and rules, and the semantics that everything else is derived from."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax import plan as plans
from tljax.errors import UserError

PARAMS = {
    "stem": {"conv": {"kernel": jnp.ones((3, 3, 3, 4))}, "bn": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}},
    "block1": {"bn1": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "conv": {"kernel": jnp.ones((1, 1, 4, 4))}},
    "block10": {"conv": {"kernel": jnp.ones((1, 1, 4, 4)), "bias": jnp.zeros(4)}},
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)},
}
STATS = {
    "stem": {"bn": {"mean": jnp.zeros(4), "var": jnp.ones(4)}},
    "block1": {"bn1": {"mean": jnp.zeros(4), "var": jnp.ones(4)}},
}
STAGES = ("stem", "block1", "block10", "head")

keys = st.sampled_from(["a", "b", "kernel", "bias", "scale"])
arrays = st.lists(st.integers(1, 3), max_size=3).map(
    lambda shape: np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
)
trees = st.dictionaries(
    keys,
    st.recursive(arrays, lambda c: st.dictionaries(keys, c, min_size=1, max_size=3), max_leaves=6),
    min_size=1,
    max_size=4,
)
multipliers = st.sampled_from([0.0, 0.1, 1.0, 2.5])


def test_patterns():
    cases = [
        ("block1", "block1/bn1/scale", True),  # naming a node names all below it
        ("block1", "block10/conv/kernel", False),  # and not what only begins alike
        ("block*", "block10/conv/kernel", True),
        ("*/bias", "head/bias", True),
        ("*/bias", "block10/conv/bias", False),  # * stays within one key
        ("**/bias", "block10/conv/bias", True),
        ("**/bias", "bias", True),
        ("**/bn?", "block1/bn1/scale", True),
        ("**", "anything/at/all", True),
        ("a.b", "aXb", False),  # a dot is a dot
        (r"re:block\d+/.*", "block10/conv/bias", True),
        (r"re:block\d+", "block10/conv/bias", False),  # a regular expression covers the whole path
    ]
    for pattern, path, expected in cases:
        assert plans.matches(pattern, path) is expected, (pattern, path)


def test_first_rule_that_matches_decides():
    plan = plans.build([("**/bias", 0.5), ("head", 1), ("**", 0)], PARAMS, STATS, STAGES)
    multiplier = {leaf.path: leaf.multiplier for leaf in plan.leaves}
    assert multiplier["head/bias"] == 0.5
    assert multiplier["head/kernel"] == 1
    assert multiplier["block10/conv/kernel"] == 0
    assert plan.rule_counts() == [("**/bias", 0.5, 4), ("head", 1.0, 1), ("**", 0.0, 5)]


def test_weight_decay_leaves_out_biases_norms_and_positions():
    params = PARAMS | {"embed": {"position": jnp.ones((9, 4)), "kernel": jnp.ones((4, 4)), "gain": jnp.ones(4)}}
    plan = plans.build([("**", 1)], params, STATS, ("embed", *STAGES))
    assert {leaf.path for leaf in plan.leaves if leaf.decay} == {
        "stem/conv/kernel", "block1/conv/kernel", "block10/conv/kernel", "head/kernel", "embed/kernel"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "live"),
    [
        ([("head", 1), ("**", 0)], {"head"}),
        ([("block1", 1), ("head", 1), ("**", 0)], {"block1", "block1/bn1", "head"}),
        # Only the convolution of block1 trains: its norm's own parameters are frozen, so its statistics stay.
        ([("block1/conv", 1), ("head", 1), ("**", 0)], {"block1", "head"}),
        # BitFit: the norm's bias trains, so it is live.
        ([("block1/bn1/bias", 1), ("head", 1), ("**", 0)], {"block1", "block1/bn1", "head"}),
    ],
)
def test_what_is_live(rules, live):
    plan = plans.build(rules, PARAMS, STATS, STAGES)
    assert plan.live == live
    expected = sum(leaf.size for leaf in plan.leaves if not leaf.multiplier)
    expected += 8 * (("block1/bn1" not in live) + ("stem/bn" not in live))
    assert sum(plan.frozen.values()) == expected


def test_a_norm_without_parameters_follows_its_stage():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    stats = {"a": {"norm": {"mean": jnp.zeros(2)}}}
    assert "a/norm" in plans.build([("**", 1)], params, stats).live
    assert "a/norm" not in plans.build([("head", 1), ("**", 0)], params, stats).live


def test_frozen_prefix_ends_at_the_first_live_stage():
    assert plans.build([("block10", 1), ("**", 0)], PARAMS, STATS, STAGES).prefix == ("stem", "block1")
    assert plans.build([("stem/bn", 1), ("**", 0)], PARAMS, STATS, STAGES).prefix == ()
    assert plans.build([("head", 1), ("**", 0)], PARAMS, STATS, STAGES).prefix == STAGES[:3]


def test_digests_notice_one_bit_and_only_of_what_is_frozen():
    plan = plans.build([("head", 1), ("block1", 1), ("**", 0)], PARAMS, STATS, STAGES)
    before = plan.frozen_digests(PARAMS, STATS)
    assert before["params/stem/bn/scale"] == hashlib.sha256(np.ones(4, np.float32).tobytes()).hexdigest()
    flipped = jax.tree.map(np.array, PARAMS)
    flipped["stem"]["conv"]["kernel"].view(np.uint32)[0, 0, 0, 0] ^= 1
    after = plan.frozen_digests(flipped, STATS)
    assert [k for k in before if before[k] != after[k]] == ["params/stem/conv/kernel"]
    moved = jax.tree.map(np.array, STATS)
    moved["stem"]["bn"]["mean"][0] = 1e-30
    moved["block1"]["bn1"]["mean"][0] = 5  # block1 trains: its statistics may move
    after = plan.frozen_digests(PARAMS, moved)
    assert [k for k in before if before[k] != after[k]] == ["batch_stats/stem/bn/mean"]
    trained = PARAMS | {"head": {"kernel": jnp.zeros((4, 2)), "bias": jnp.ones(2)}}
    assert plan.frozen_digests(trained, STATS) == before


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("head", 1)], "no rule matches block1/bn1/bias"),
        ([("haed", 1), ("**", 0)], "rule 'haed' matches no parameter; nearest: head"),
        ([("head", 1), ("head/bias", 0), ("**", 0)], "rule 'head/bias' decides nothing"),
        ([("**", 0)], "everything is frozen"),
        ([("re:(", 0)], "no regular expression"),
    ],
)
def test_bad_rules_are_named(rules, message):
    with pytest.raises(UserError, match=r".*") as error:
        plans.build(rules, PARAMS, STATS, STAGES)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unmatched_paths_are_listed_ten_at_most_and_counted():
    params = {f"stage{i:02}": jnp.ones(1) for i in range(25)} | {"head": jnp.ones(1)}
    with pytest.raises(UserError, match=r"stage00.*stage09 and 15 more"):
        plans.build([("head", 1)], params)


def test_another_tree_is_refused():
    plan = plans.build([("**", 1)], PARAMS, STATS, STAGES)
    with pytest.raises(UserError, match="missing head/bias, head/kernel; unexpected tail"):
        plan.split({k: v for k, v in PARAMS.items() if k != "head"} | {"tail": jnp.ones(1)})


@settings(max_examples=60, deadline=None)
@given(tree=trees, data=st.data())
def test_split_and_merge_are_inverse_and_every_leaf_has_one_label(tree, data):
    names = plans.paths(tree)
    if not names:
        return
    rules = [(f"re:{name}", data.draw(multipliers)) for name in names]
    if not any(m for _, m in rules):
        rules[0] = (rules[0][0], 1.0)
    plan = plans.build(rules, tree)
    trainable, frozen = plan.split(tree)
    expected = {name for (_, m), name in zip(rules, names) if m}
    assert set(plans.paths(trainable)) == expected
    assert set(plans.paths(frozen)) == set(names) - expected
    merged = plan.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tree)))
    labels = plan.tree(lambda leaf: leaf.label)
    assert jax.tree.structure(labels) == jax.tree.structure(tree)
    assert {label for label in jax.tree.leaves(labels)} == {"frozen" if not m else f"x{m:.17g}" for _, m in rules}
    assert sum(plan.frozen.values()) == sum(
        leaf.size for name, leaf in zip(names, jax.tree.leaves(tree)) if name not in expected
    )


def test_any_pytree_serves():
    tree = {"encoder": [np.ones((2, 2)), np.zeros(2)], "head": (np.ones((2, 1)),)}
    plan = plans.build([("encoder/0", 0), ("**", 1)], tree)
    assert [leaf.path for leaf in plan.trainable] == ["encoder/1", "head/0"]
    trainable, frozen = plan.split(tree)
    assert isinstance(plan.merge(trainable, frozen)["head"], tuple)


def test_rows_count_what_a_hand_counts():
    plan = plans.build([("block1", 0.1), ("head", 1), ("**", 0)], PARAMS, STATS, STAGES)
    rows = {row["stage"]: row for row in plan.rows({leaf.path: 8 * leaf.size for leaf in plan.trainable})}
    assert rows["stem"] == {
        "stage": "stem",
        "parameters": 108 + 8,
        "trainable": 0,
        "multiplier": "0",
        "decay": "no",
        "norm": "stored",
        "optimizer_bytes": 0,
    }
    assert rows["block1"] == {
        "stage": "block1",
        "parameters": 24,
        "trainable": 24,
        "multiplier": "0.1",
        "decay": "some",
        "norm": "moving",
        "optimizer_bytes": 8 * 24,
    }
    assert rows["head"]["norm"] == "-"
